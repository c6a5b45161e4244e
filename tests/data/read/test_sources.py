"""The files of a source are found and sorted; what cannot be used is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.data.build.build import prepare
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, built_texts, config, jsonl, one_source, split_texts, write


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "matches no file"),
        ("a.txt", b"", "no document"),
        ("a.parquet", b"", "unreadable Parquet"),
        ("a.jsonl.gz", b"", r"damaged archive .*empty"),
        ("a.bin", b"x", r"a\.bin.*`format`"),
        ("a.txt", b" \n", "no document"),
    ],
)
def test_files_that_cannot_be_used_are_named(name: str | None, content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in" / name, content) if name else tmp_path / "nothing" / "*.txt"
    with pytest.raises(DataError, match=words):
        prepare(config(tmp_path / "out", [one_source(path)]))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_with_brackets_in_its_name_is_found_by_it(tmp_path: Path) -> None:
    write(tmp_path / "data1.txt", b"other")
    path = write(tmp_path / "data[1].txt", b"this one")
    prepare(config(tmp_path / "out", [one_source(path)]))
    assert split_texts(tmp_path / "out") == ["this one"]


@pytest.mark.parametrize("pattern", ["in", "i*"])
def test_a_folder_is_named_as_one(pattern: str, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", b"text")
    with pytest.raises(DataError, match=r"folders.*\*\*/\*\.jsonl"):
        prepare(config(tmp_path / "out", [one_source(tmp_path / pattern)]))


@pytest.mark.timeout(60)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: .*regular file"):
        prepare(config(tmp_path / "out", [one_source(tmp_path / "a.txt")]))


def test_files_are_read_in_sorted_order_and_listed_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt"):
        write(tmp_path / "in" / name, name.encode())
    assert built_texts(tmp_path, tmp_path / "in" / "c.txt", tmp_path / "in" / "*.txt") == ["a.txt", "b.txt", "c.txt"]


@pytest.mark.parametrize(
    "name", ["c4-train.00000-of-01024.json.gz", "00.jsonl.zst", "part.ndjson", "v1_5-0000.json.gz", "plain.json"]
)
def test_the_names_of_published_corpora_show_their_format(name: str, tmp_path: Path) -> None:
    content = jsonl(["a", "b"])
    packed = COMPRESS[name.rsplit(".", 1)[1]](content) if name.endswith(("gz", "zst")) else content
    assert built_texts(tmp_path, write(tmp_path / "in" / name, packed)) == ["a", "b"]


def test_the_format_of_the_config_wins_over_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "data.log.gz", COMPRESS["gz"](jsonl(["a", "b"])))
    assert built_texts(tmp_path, path, format="jsonl") == ["a", "b"]
