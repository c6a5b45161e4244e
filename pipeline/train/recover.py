"""The newest whole checkpoint of a run, the same on all ranks, and the state that a start begins with."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.layout import UnreadableCheckpoint, published
from pipeline.checkpoint.read import CheckpointReader, verify
from pipeline.config.sections import Config
from pipeline.errors import CheckpointError, DataError, UsageError
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.fresh import INIT_VERSION
from pipeline.train.origin.origin import Origin
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

    Raises:
        UnreadableCheckpoint: The storage does not answer; training on from an older checkpoint, or from nothing, would
            throw away what may be whole.
    """
    rejected: list[str] = []
    for name in group.broadcast([str(p) for p in published(checkpoints)] if world.is_first else [], world):
        folder, problem, unreadable = Path(name), None, False
        try:
            verify(folder, mine=lambda index: index % world.size == world.rank)
        except CheckpointError as error:
            problem, unreadable = str(error), isinstance(error, UnreadableCheckpoint)
        answers = group.gather((problem, unreadable), world)
        for why, no_answer in answers:
            if no_answer:
                raise UnreadableCheckpoint(why)
        problems = [why for why, _ in answers if why]
        if not problems:
            return Recovery(folder, tuple(rejected))
        rejected.append(problems[0])
        if world.is_first:
            quarantine(folder)
        group.barrier(world)
    return Recovery(None, tuple(rejected))


def fill(engine: Engine, recovery: Recovery, origin: Origin | None, config: Config, data_digest: str) -> dict[str, Any]:
    """Loads the checkpoint if there is one, else takes the origin, else draws weights; returns step and other state."""
    if recovery.checkpoint is None:
        if origin is None:
            engine.draw(config.train.seed)
            return {"initialization": INIT_VERSION}
        state = origin.fill(engine)
        _restore_rng(state)
        return state
    reader = CheckpointReader(recovery.checkpoint)
    if "rng" not in reader.manifest.state:
        raise UsageError(
            f"{recovery.checkpoint}: is an average, without moments to resume with; branch from it (`init.from`) under "
            "another `name`"
        )
    trained_on = reader.manifest.state["dataset"]
    if trained_on != data_digest:
        raise DataError(
            f"{recovery.checkpoint}: was trained on the dataset {trained_on[:12]}, and data.path holds "
            f"{data_digest[:12]} now; restore that dataset, or give the new experiment another `name`"
        )
    engine.load(reader)
    reader.close()
    state = reader.manifest.state
    _restore_rng(state)
    return {"initialization": 1, **state, "step": reader.manifest.step}  # the first version had no number


def _restore_rng(state: dict[str, Any]) -> None:
    if "rng" in state:
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))


def quarantine(folder: Path) -> None:
    """Renames a checkpoint that must not be used, and keeps it for inspection."""
    kept = folder.with_name(f"{folder.name}.rejected")
    if kept.exists():
        shutil.rmtree(kept)
    folder.rename(kept)
