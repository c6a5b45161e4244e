"""Every kind of records gives the same documents, in order, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.helpers import (
    COMPRESS,
    FORMAT_TEXTS,
    built_texts,
    documents,
    jsonl,
    members,
    write,
)

SEPARATOR = "<|doc|>"
# 10 to 20 slices from these texts.
SMALL_SLICES = 0.005


@pytest.mark.parametrize("compression", [None, *COMPRESS])
@pytest.mark.parametrize("kind", ["whole", "separated", "jsonl"])
@pytest.mark.parametrize("slice_size_mb", [SMALL_SLICES, 64.0])
def test_text_and_json_give_their_documents_plain_and_compressed(
    tmp_path: Path, compression: str | None, kind: str, slice_size_mb: float
) -> None:
    ending = f".{compression}" if compression else ""
    if kind == "whole":
        contents = {f"{i:03d}.txt": t.encode() for i, t in enumerate(FORMAT_TEXTS[:40])}
        expected = FORMAT_TEXTS[:40]
    else:
        content = jsonl(FORMAT_TEXTS) if kind == "jsonl" else SEPARATOR.join(FORMAT_TEXTS).encode()
        contents = {f"all.{'jsonl' if kind == 'jsonl' else 'txt'}": content}
        expected = FORMAT_TEXTS
    for name, content in contents.items():
        write(tmp_path / "in" / (name + ending), members(compression, content) if compression else content)
    separator = {"separator": SEPARATOR} if kind == "separated" else {}
    assert built_texts(tmp_path, tmp_path / "in" / "*", slice_size_mb=slice_size_mb, **separator) == expected


def test_a_large_plain_file_becomes_several_slices(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", jsonl(FORMAT_TEXTS))
    assert built_texts(tmp_path, path) == FORMAT_TEXTS
    assert len(list((tmp_path / "out" / "slices").iterdir())) == -(-path.stat().st_size // 5000)


def test_a_large_compressed_file_becomes_several_slices(tmp_path: Path) -> None:
    texts = FORMAT_TEXTS * 5
    path = write(tmp_path / "all.jsonl.gz", COMPRESS["gz"](jsonl(texts)))
    assert path.stat().st_size > 5000
    assert built_texts(tmp_path, path) == texts
    assert len(list((tmp_path / "out" / "slices").iterdir())) > 20


@pytest.mark.parametrize("slice_size_mb", [0.001, 0.007])
def test_records_much_longer_than_a_slice_are_whole_and_once(tmp_path: Path, slice_size_mb: float) -> None:
    texts = documents(8, seed=2, longest=4000)
    path = write(tmp_path / "all.jsonl", jsonl(texts))
    assert built_texts(tmp_path, path, slice_size_mb=slice_size_mb) == texts
