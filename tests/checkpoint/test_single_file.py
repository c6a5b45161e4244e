"""A single file holds model, optimizer and iteration, and no pickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.single_file import load_checkpoint, save_checkpoint
from pipeline.errors import CheckpointError
from pipeline.optim.adamw import AdamW


def trained(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    take(model, optimizer, steps)
    return model, optimizer


def take(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), float(step + 1))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_resumes_bit_for_bit(tmp_path: Path, in_memory: bool) -> None:
    model, optimizer = trained(0, 3)
    target = io.BytesIO() if in_memory else tmp_path / "one.safetensors"
    save_checkpoint(model, optimizer, 3, target)
    if isinstance(target, io.BytesIO):
        target.seek(0)
    other, other_optimizer = trained(1, 1)
    assert load_checkpoint(target, other, other_optimizer) == 3
    for pair in ((model, optimizer), (other, other_optimizer)):
        take(*pair, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_pickle_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "one.pt"
    path.write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(CheckpointError, match=r"one.pt: .*not a checkpoint"):
        load_checkpoint(path, *trained(0, 0))


def test_an_error_names_a_missing_or_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    with pytest.raises(CheckpointError, match=r"one.safetensors: .*cannot be read"):
        load_checkpoint(path, *trained(0, 0))
    save_checkpoint(*trained(0, 1), 1, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"one.safetensors: .*damaged"):
        load_checkpoint(path, *trained(0, 0))


def test_a_slash_in_the_name_of_a_moment_is_part_of_the_name(tmp_path: Path) -> None:
    weight = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.1)
    optimizer.state[weight.weight]["moments/first"] = torch.tensor([1.0, 2.0])
    save_checkpoint(weight, optimizer, 1, tmp_path / "one.safetensors")
    other = torch.optim.SGD(weight.parameters(), lr=0.1)
    load_checkpoint(tmp_path / "one.safetensors", weight, other)
    assert other.state[weight.weight]["moments/first"].tolist() == [1.0, 2.0]
