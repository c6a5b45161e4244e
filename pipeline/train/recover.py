"""Which checkpoint a start goes on from: the newest that is whole, and the same on all ranks."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.layout import published
from pipeline.checkpoint.read import verify
from pipeline.errors import CheckpointError
from pipeline.run.world import World
from pipeline.train.ranks import group


@dataclass(frozen=True)
class Recovery:
    """What a start found.

    Attributes:
        checkpoint: The folder to load; None for a fresh start.
        rejected: What was wrong with each newer one, which has been set aside.
    """

    checkpoint: Path | None
    rejected: tuple[str, ...]


def find_checkpoint(checkpoints: Path, world: World) -> Recovery:
    """Checks the checkpoints byte for byte, newest first, the ranks sharing the files.

    A damaged one is renamed to `step_X.rejected` and kept for a person to look at.
    """
    rejected: list[str] = []
    for folder in group.broadcast(published(checkpoints) if world.is_first else [], world):
        problem = None
        try:
            verify(folder, mine=lambda index: index % world.size == world.rank)
        except CheckpointError as error:
            problem = str(error)
        problems = [p for p in group.gather(problem, world) if p]
        if not problems:
            return Recovery(folder, tuple(rejected))
        rejected.append(problems[0])
        if world.is_first:
            set_aside(folder)
        group.barrier(world)
    return Recovery(None, tuple(rejected))


def set_aside(folder: Path) -> None:
    """Renames a checkpoint that must not be used, so that a person can look at it."""
    aside = folder.with_name(f"{folder.name}.rejected")
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)
