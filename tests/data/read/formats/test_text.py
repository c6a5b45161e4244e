"""Text is divided at separators, read from the left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.helpers import built_texts, write


@pytest.mark.parametrize("slice_size_mb", [0.001, 0.01, 64.0])
def test_a_separator_that_can_overlap_itself_is_read_from_the_left(tmp_path: Path, slice_size_mb: float) -> None:
    path = write(tmp_path / "all.txt", b"a\n\n\nb\n\nc\n\n" * 2000)
    assert built_texts(tmp_path, path, separator="\n\n", slice_size_mb=slice_size_mb) == ["a", "\nb", "c"] * 2000
