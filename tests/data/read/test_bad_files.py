"""Files that are cut off, missing, empty or no files at all: each is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.data.build.build import prepare
from pipeline.errors import DataError
from tests.data.helpers import COMPRESS, config, documents, jsonl, one_source, split_texts, write


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("cut", ["end", "middle", "second member"])
def test_a_truncated_archive_is_noticed(compression: str, cut: str, tmp_path: Path) -> None:
    texts = documents(3000, seed=3)
    pack = COMPRESS[compression]
    whole = pack(jsonl(texts))
    content = {
        "end": whole[:-3],
        "middle": whole[: len(whole) // 2],
        "second member": pack(jsonl(texts[:1500])) + pack(jsonl(texts[1500:]))[:40],
    }[cut]
    path = write(tmp_path / "in" / f"a.jsonl.{compression}", content)
    with pytest.raises(
        DataError,
        match=rf"a\.jsonl\.{compression}, line \d+, byte \d+ of the decompressed.*truncated or damaged archive",
    ):
        prepare(config(tmp_path / "out", [one_source(path)]))
    assert not (tmp_path / "out" / "manifest.json").exists()
    other = {**one_source(write(tmp_path / "o.txt", b"o")), "name": "o"}
    kept = config(tmp_path / "kept", [one_source(path), other], on_bad="skip", max_bad_fraction=0.9)
    manifest = prepare(kept)
    assert manifest.bad == {"truncated or damaged archive": 1}
    got = split_texts(tmp_path / "kept")[:-1]
    # All that can be decoded is kept; half a file of one block of bzip2 is nothing.
    least = {"end": 3000, "middle": 0 if compression == "bz2" else 1000, "second member": 1500}[cut]
    assert len(got) >= least and got == texts[: len(got)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", "matches no file"),
        ("a.txt", b"", "hold no document to train on"),
        ("a.parquet", b"", "the whole file: unreadable Parquet"),
        ("a.jsonl.gz", b"", "truncated or damaged archive .the file is empty"),
        ("a.bin", b"x", "does not tell what it holds"),
        ("a.txt", b" \n", "hold no document to train on"),
    ],
)
def test_files_that_cannot_be_used_are_named(name: str | None, content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in" / name, content) if name else tmp_path / "nothing" / "*.txt"
    with pytest.raises(DataError, match=words):
        prepare(config(tmp_path / "out", [one_source(path)]))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_file_in_two_sources_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    with pytest.raises(DataError, match="in the sources 's' and 't'"):
        prepare(config(tmp_path / "out", [one_source(path), {**one_source(path), "name": "t"}]))


def test_a_file_of_no_bytes_is_an_empty_document(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.txt"):
        write(tmp_path / name, b"text" if name == "c.txt" else b"")
    made = config(
        tmp_path / "out",
        [{"name": "s", "paths": [str(tmp_path / "*.txt"), str(tmp_path / "*.jsonl")], "split": "train"}],
    )
    source = prepare(made).sources[0]
    assert (source["records"], source["empty"], source["bad"]) == (2, 1, {})
    assert split_texts(tmp_path / "out") == ["text"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_an_archive_of_no_bytes_is_damaged_and_can_be_skipped(name: str, tmp_path: Path) -> None:
    entries = [
        one_source(write(tmp_path / name, b"")),
        {**one_source(write(tmp_path / "o.txt", b"other")), "name": "o"},
    ]
    assert sum(prepare(config(tmp_path / "out", entries, on_bad="skip", max_bad_fraction=0.9)).bad.values()) == 1


def test_a_file_with_brackets_in_its_name_is_found_by_it(tmp_path: Path) -> None:
    write(tmp_path / "data1.txt", b"other")
    path = write(tmp_path / "data[1].txt", b"this one")
    prepare(config(tmp_path / "out", [one_source(path)]))
    assert split_texts(tmp_path / "out") == ["this one"]


@pytest.mark.parametrize("pattern", ["in", "i*"])
def test_a_folder_is_named_as_one(pattern: str, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", b"text")
    with pytest.raises(DataError, match=r"names a folder, not files; name those in it, as .*\*\*/\*\.jsonl"):
        prepare(config(tmp_path / "out", [one_source(tmp_path / pattern)]))


@pytest.mark.timeout(60)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.txt: of source s is no regular file"):
        prepare(config(tmp_path / "out", [one_source(tmp_path / "a.txt")]))
