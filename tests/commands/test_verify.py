"""Damage is found and named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.checkpoint.pending import begin_attempt
from pipeline.checkpoint.read import newest_checkpoint, verify
from pipeline.commands.verify import verify_path
from pipeline.errors import CheckpointError, UsageError
from tests.checkpoint.support import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    begin_attempt(tmp_path, "a1")
    for step in (1, 2):
        save(tmp_path, step)
    return tmp_path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_flipped_bit_is_found_and_its_file_named(folder: Path, name: str) -> None:
    flip_a_bit(folder / "step_00000002" / name)
    with pytest.raises(CheckpointError, match=f"step_00000002/{name}: is"):
        verify(folder / "step_00000002")
    assert newest_checkpoint(folder).name == "step_00000001"


def test_a_truncated_and_a_missing_file_are_named(folder: Path) -> None:
    file = folder / "step_00000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: is torn"):
        verify(file.parent)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors: cannot be read"):
        verify(file.parent)


def test_with_all_damaged_each_is_named(folder: Path) -> None:
    for file in folder.glob("step_*/rank_00000.safetensors"):
        flip_a_bit(file)
    with pytest.raises(CheckpointError, match=r"(?s)step_00000002.*step_00000001"):
        newest_checkpoint(folder)


def test_verify_takes_a_checkpoint_and_refuses_what_is_nothing(folder: Path) -> None:
    assert "all 1 files of the checkpoint" in verify_path(str(folder / "step_00000001"))
    with pytest.raises(UsageError, match="neither a dataset nor a checkpoint"):
        verify_path(str(folder))
