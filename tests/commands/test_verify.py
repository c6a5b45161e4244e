"""Damage is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoint.pending import take_over
from pipeline.commands.verify import verify_path
from pipeline.errors import UsageError
from tests.checkpoint.support import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    take_over(tmp_path, "a1")
    for step in (1, 2):
        save(tmp_path, step)
    return tmp_path


def test_verify_takes_a_checkpoint_and_refuses_what_is_nothing(folder: Path) -> None:
    assert "all 1 files of the checkpoint" in verify_path(str(folder / "step_00000001"))
    with pytest.raises(UsageError, match="neither a dataset nor a checkpoint"):
        verify_path(str(folder))
