"""The checkpoint that a start resumes from: the newest whole one, the same on all ranks."""

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
    """What a start found."""

    checkpoint: Path | None
    """The folder to load; None for a fresh start."""
    rejected: tuple[str, ...]
    """The problem of each newer checkpoint, all of which have been quarantined."""


def find_checkpoint(checkpoints: Path, world: World) -> Recovery:
    """Returns the newest whole checkpoint, checked byte for byte, the ranks sharing the files.

    Damaged ones are quarantined: renamed to `step_X.rejected` and kept for inspection.
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
            quarantine(folder)
        group.barrier(world)
    return Recovery(None, tuple(rejected))


def quarantine(folder: Path) -> None:
    """Renames a checkpoint that must not be used, and keeps it for inspection."""
    kept = folder.with_name(f"{folder.name}.rejected")
    if kept.exists():
        shutil.rmtree(kept)
    folder.rename(kept)
