"""Savers without training: a few fragments and what was reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore, Store

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import KEYS
from pipeline.checkpoint.pending import Writer
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.sections import CheckpointConfig

NUMEL = 1000

# One a folder: the savers of several ranks share it.
_STORES: dict[Path, HashStore] = {}


def fragments(value: float, rank: int = 0, world_size: int = 1, numel: int = NUMEL) -> list[OwnedFragment]:
    """This rank's part of one parameter whose elements, and moments, are all `value`."""
    share = numel // world_size
    tensors = {key: torch.full((share,), value) for key in KEYS}
    return [OwnedFragment("layer.weight", (numel,), rank * share, tensors)]


def saver(
    folder: Path,
    reports: list[Saved],
    rank: int = 0,
    world_size: int = 1,
    attempt: str = "a1",
    store: Store | None = None,
    rollback_steps: int = 0,
    **config: Any,
) -> CheckpointSaver:
    """A saver of this rank that appends what it reports; ranks that are processes need a `store` that all reach."""
    writer = Writer(rank, world_size, 0, attempt, store or _STORES.setdefault(folder, HashStore()))
    return CheckpointSaver(folder, writer, CheckpointConfig(**config), reports.append, rollback_steps)


def save(folder: Path, step: int, val_loss: float | None = None, **config: Any) -> None:
    """Saves one checkpoint and waits for it."""
    reports: list[Saved] = []
    one = saver(folder, reports, **config)
    one.save(step, fragments(float(step)), {"val_loss": val_loss})
    one.wait()
    assert reports[-1].error is None, reports[-1].error
