"""Damage to a checkpoint is found, named, and never read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pipeline.checkpoint.layout import KEYS
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.read import CheckpointReader, newest_checkpoint, verify
from pipeline.errors import CheckpointError
from tests.checkpoint.support import NUMEL, flip_a_bit, fragments, saver, two_checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return two_checkpoints(tmp_path)


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


def test_if_all_are_damaged_each_is_named(folder: Path) -> None:
    for file in folder.glob("step_*/rank_00000.safetensors"):
        flip_a_bit(file)
    with pytest.raises(CheckpointError, match=r"(?s)step_00000002.*step_00000001"):
        newest_checkpoint(folder)


def test_a_folder_without_checkpoints_is_named_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: .*train"):
        newest_checkpoint(tmp_path)


def test_any_part_of_a_parameter_is_read_across_the_files_of_two_ranks(tmp_path: Path) -> None:
    take_over(tmp_path, "a1")
    both = [saver(tmp_path, [], rank, 2) for rank in range(2)]
    for rank, one in enumerate(both):
        one.save(1, fragments(float(rank), rank, 2), {})
    for one in both:
        one.wait()
    reader = CheckpointReader(newest_checkpoint(tmp_path))
    out = torch.full((6,), -1.0)
    reader.read("exp_avg", "layer.weight", NUMEL // 2 - 2, out)
    assert out.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(CheckpointError, match="exp_avg/layer.weight"):
        reader.read("exp_avg", "layer.weight", NUMEL - 2, out)


@pytest.mark.parametrize("stored", [torch.zeros(1), torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL + 1)])
def test_a_stored_tensor_that_is_not_what_the_manifest_says_is_refused(folder: Path, stored: torch.Tensor) -> None:
    file = folder / "step_00000002" / "rank_00000.safetensors"
    safetensors.torch.save_file({f"{key}/layer.weight": stored.clone() for key in KEYS}, file)
    with pytest.raises(CheckpointError, match=f"^{file}: "):
        CheckpointReader(file.parent).read_whole("weight", "layer.weight")
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=f"^{file}: "):
        CheckpointReader(file.parent).read_whole("weight", "layer.weight")


@pytest.mark.parametrize("kind", ["link", "fifo", "device"])
@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_links_out_of_a_checkpoint_fifos_and_devices_are_refused(
    folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    file = folder / "step_00000002" / name
    elsewhere = file.rename(tmp_path / "elsewhere")
    {"link": lambda: file.symlink_to(elsewhere), "fifo": lambda: os.mkfifo(file),
     "device": lambda: file.symlink_to("/dev/zero")}[kind]()  # fmt: skip
    with pytest.raises(CheckpointError, match=f"^{file}: "):
        verify(file.parent)
    with pytest.raises(CheckpointError, match=f"^{file}: "):
        CheckpointReader(file.parent).read_whole("weight", "layer.weight")
