"""What a start begins with, the same on all ranks: the newest whole checkpoint, or weights from elsewhere."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from pipeline.checkpoint.layout import published
from pipeline.checkpoint.read import verify
from pipeline.config.sections import Config
from pipeline.errors import CheckpointError, UsageError
from pipeline.huggingface.open_weights import OpenWeights
from pipeline.run.folder import run_for
from pipeline.run.world import World
from pipeline.train.ranks import group

# To read a file of weights once, and check its values, on a slow disk.
_CHECK_TIMEOUT = timedelta(hours=1)


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


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a run starts from, checked."""

    weights: OpenWeights
    record: dict[str, str]
    """Where they come from and the digest of the folder: for the checkpoints and the provenance."""


def initial_weights(config: Config, tokenizer_digest: str, world: World) -> InitialWeights | None:
    """Returns the weights that the section `init` names, the ranks sharing the check of the files; None if it is empty.

    Args:
        config: The experiment.
        tokenizer_digest: Digest of the tokenizer that the data was prepared with.
        world: This process's place.

    Raises:
        UsageError: The folder is not what the config and the data expect, or not what the run started from before.
    """
    folder = config.init.folder
    if folder is None:
        return None
    weights = OpenWeights(folder, config.model)
    weights.refuse_other_tokenizer(config.data.path, tokenizer_digest)
    problem, checked = None, {}
    try:
        checked = {file.name: weights.check_values(file) for file in weights.files[world.rank :: world.size]}
    except UsageError as error:
        problem = str(error)
    found = group.exchange((problem, checked), world, _CHECK_TIMEOUT)
    for other, _ in found:
        if other is not None:
            raise UsageError(other)
    digest = weights.digest({name: sha256 for _, part in found for name, sha256 in part.items()})
    before = [start["init"]["digest"] for start in run_for(config).provenance() if start.get("init")]
    if before and before[-1] != digest:
        raise UsageError(
            f"{folder}: has changed since this run started from it (digest {before[-1][:12]}, now {digest[:12]}); "
            "restore it, or give the new experiment another `name`"
        )
    return InitialWeights(weights, {"from": f"hf:{folder}", "digest": digest})
