"""Every kind of source gives the same documents, in order, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.build.build import prepare
from tests.data.helpers import COMPRESS, config, documents, jsonl, members, split_texts, write, write_parquet

TEXTS = documents(400, seed=1)
SEPARATOR = "<|doc|>"
# 10 to 20 slices from these texts.
SMALL_SLICES = 0.005


def _build(tmp_path: Path, *paths: Path, slice_size_mb: float = SMALL_SLICES, **source: object) -> list[str]:
    entry = {"name": "s", "paths": [str(p) for p in paths], "split": "train", **source}
    prepare(config(tmp_path / "out", [entry], slice_size_mb=slice_size_mb))
    return split_texts(tmp_path / "out")


@pytest.mark.parametrize("compression", [None, *COMPRESS])
@pytest.mark.parametrize("kind", ["whole", "separated", "jsonl"])
@pytest.mark.parametrize("slice_size_mb", [SMALL_SLICES, 64.0])
def test_text_and_json_give_their_documents_plain_and_compressed(
    tmp_path: Path, compression: str | None, kind: str, slice_size_mb: float
) -> None:
    ending = f".{compression}" if compression else ""
    if kind == "whole":
        contents = {f"{i:03d}.txt": t.encode() for i, t in enumerate(TEXTS[:40])}
        expected = TEXTS[:40]
    else:
        content = jsonl(TEXTS) if kind == "jsonl" else SEPARATOR.join(TEXTS).encode()
        contents = {f"all.{'jsonl' if kind == 'jsonl' else 'txt'}": content}
        expected = TEXTS
    for name, content in contents.items():
        write(tmp_path / "in" / (name + ending), members(compression, content) if compression else content)
    separator = {"separator": SEPARATOR} if kind == "separated" else {}
    assert _build(tmp_path, tmp_path / "in" / "*", slice_size_mb=slice_size_mb, **separator) == expected


@pytest.mark.parametrize("compression", [None, *COMPRESS])
def test_parquet_gives_its_documents_from_row_groups_of_any_size(tmp_path: Path, compression: str | None) -> None:
    plain = write_parquet(tmp_path / "all.parquet", TEXTS, row_group_size=17)
    if compression is not None:
        path = write(tmp_path / f"all.parquet.{compression}", COMPRESS[compression](plain.read_bytes()))
        assert _build(tmp_path, path) == TEXTS
    else:
        assert _build(tmp_path, plain) == TEXTS
        slices = list((tmp_path / "out" / "slices").iterdir())
        assert len(slices) > 3


def test_a_large_plain_file_becomes_several_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", jsonl(TEXTS))
    assert _build(tmp_path, path) == TEXTS
    assert len(list((tmp_path / "out" / "slices").iterdir())) == -(-path.stat().st_size // 5000)


def test_a_large_compressed_file_becomes_several_slices(tmp_path: Path) -> None:
    texts = TEXTS * 5
    path = write(tmp_path / "all.jsonl.gz", COMPRESS["gz"](jsonl(texts)))
    assert path.stat().st_size > 5000
    assert _build(tmp_path, path) == texts
    assert len(list((tmp_path / "out" / "slices").iterdir())) > 20


@pytest.mark.parametrize("slice_size_mb", [0.001, 0.01, 64.0])
def test_a_separator_that_can_overlap_itself_is_read_from_the_left(tmp_path: Path, slice_size_mb: float) -> None:
    path = write(tmp_path / "all.txt", b"a\n\n\nb\n\nc\n\n" * 2000)
    assert _build(tmp_path, path, separator="\n\n", slice_size_mb=slice_size_mb) == ["a", "\nb", "c"] * 2000


@pytest.mark.parametrize("slice_size_mb", [0.001, 0.007])
def test_records_much_longer_than_a_slice_are_whole_and_once(tmp_path: Path, slice_size_mb: float) -> None:
    texts = documents(8, seed=2, longest=4000)
    path = write(tmp_path / "all.jsonl", jsonl(texts))
    assert _build(tmp_path, path, slice_size_mb=slice_size_mb) == texts


def test_files_are_read_in_sorted_order_and_listed_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.txt"):
        write(tmp_path / "in" / name, name.encode())
    assert _build(tmp_path, tmp_path / "in" / "c.txt", tmp_path / "in" / "*.txt") == ["a.txt", "b.txt", "c.txt"]


def test_another_field_and_unusual_lines_of_json(tmp_path: Path) -> None:
    lines = [
        '{"body": "one", "text": 3}',
        "",
        ' {"body" : "t\\u0077o \\ud83d\\ude42"}\r',
        '{"text": null, "body": "three", "deep": {"body": [1, {"body": "not me"}]}}',
        '{"body": "first", "body": "last wins"}',
        '{"id": ' + "1" * 5000 + ', "body": "more digits than Python converts"}',
    ]
    path = write(tmp_path / "all.jsonl", "\n".join(lines).encode())
    expected = ["one", "two 🙂", "three", "last wins", "more digits than Python converts"]
    assert _build(tmp_path, path, field="body") == expected


def test_lines_that_end_as_on_windows_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.read.formats.jsonl._parse_line", None)
    path = write(tmp_path / "all.jsonl", jsonl(TEXTS).replace(b"\n", b"\r\n"))
    assert _build(tmp_path, path) == TEXTS


def test_the_format_of_the_config_wins_over_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "data.log.gz", COMPRESS["gz"](jsonl(["a", "b"])))
    assert _build(tmp_path, path, format="jsonl") == ["a", "b"]


def test_blank_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", jsonl(["a", "", " \n\t", "b"]))
    assert _build(tmp_path, path) == ["a", "b"]
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"][0]
    assert (source["records"], source["empty"]) == (4, 2)
