"""Text is divided at separators, read from the left."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.build.build import prepare
from pipeline.data.read import record_blocks
from pipeline.errors import DataError
from tests.data.helpers import built_texts, config, split_texts, write


@pytest.mark.parametrize("slice_size_mb", [0.001, 0.01, 64.0])
def test_a_separator_that_can_overlap_itself_is_read_from_the_left(tmp_path: Path, slice_size_mb: float) -> None:
    path = write(tmp_path / "all.txt", b"a\n\n\nb\n\nc\n\n" * 2000)
    assert built_texts(tmp_path, path, separator="\n\n", slice_size_mb=slice_size_mb) == ["a", "\nb", "c"] * 2000


def test_a_document_of_exactly_the_limit_is_kept_whatever_its_separator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_blocks, "BLOCK_BYTES", 64)
    path = tmp_path / "all.txt"
    source = {"name": "s", "paths": [str(path)], "split": "train", "separator": "<end>"}
    longest = "x" * 1000
    write(path, f"short<end>{longest}<end>".encode())
    prepare(config(tmp_path / "kept", [source], max_document_mb=0.001))
    assert split_texts(tmp_path / "kept") == ["short", longest]
    write(path, f"short<end>x{longest}<end>".encode())
    with pytest.raises(DataError, match=r"all\.txt.* 0\.001 MB"):
        prepare(config(tmp_path / "refused", [source], max_document_mb=0.001))
