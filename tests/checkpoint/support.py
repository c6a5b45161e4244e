"""Savers without training: a few fragments, and the outcomes they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore, Store

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import KEYS, published
from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.train_sections import CheckpointConfig

NUMEL = 1000

# One per folder: the savers of several ranks share it.
_STORES: dict[Path, HashStore] = {}


def fragments(
    value: float, rank: int = 0, world_size: int = 1, numel: int = NUMEL, name: str = "layer.weight"
) -> list[OwnedFragment]:
    """This rank's part of one parameter whose elements, and moments, are all `value`."""
    share = numel // world_size
    tensors = {key: torch.full((share,), value) for key in KEYS}
    return [OwnedFragment(name, (numel,), rank * share, tensors)]


def saver(
    folder: Path,
    reports: list[Saved],
    rank: int = 0,
    world_size: int = 1,
    start_id: str = "a1",
    store: Store | None = None,
    rollback_steps: int = 0,
    interval: int = 1,
    **config: Any,
) -> CheckpointSaver:
    """A saver of this rank that appends its reports; ranks in separate processes need a `store` that all can reach."""
    identity = RankIdentity(rank, world_size, 0, start_id, store or _STORES.setdefault(folder, HashStore()))
    one = CheckpointSaver(folder, identity, CheckpointConfig(**config), reports.append, rollback_steps, interval)
    if store is None:  # the ranks are in one process, without a group to agree in
        one._gather = lambda value: [value]  # type: ignore[method-assign]
    return one


def save(folder: Path, step: int, val_loss: float | None = None, **config: Any) -> None:
    """Saves one checkpoint and waits for it."""
    reports: list[Saved] = []
    one = saver(folder, reports, **config)
    one.save(step, fragments(float(step)), {"val_loss": val_loss})
    one.wait()
    assert reports[-1].error is None, reports[-1].error


def steps(folder: Path) -> list[str]:
    """Returns the names of the published checkpoints, newest first."""
    return [path.name for path in published(folder)]


def two_checkpoints(folder: Path) -> Path:
    """Publishes the checkpoints of steps 1 and 2 in a folder; returns it."""
    take_over(folder, "a1")
    for step in (1, 2):
        save(folder, step)
    return folder


def flip_a_bit(path: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
