"""Which checkpoints stay: the newest, every K-th for ever, and the best by validation loss."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError


def remove_old(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Deletes what the policy does not keep; called after a newer checkpoint was published.

    Returns:
        The folders that were deleted.
    """
    folders = published(checkpoints)
    kept = set(folders[: config.keep_last])
    if config.keep_every:
        kept |= {f for f in folders if (step_of(f) or 0) % config.keep_every == 0}
    best = best_checkpoint(folders) if config.keep_best else None
    if best is not None:
        kept.add(best)
    removed = [f for f in folders if f not in kept]
    for folder in removed:
        # Renamed first: a deletion cut short must not leave a checkpoint that looks published.
        doomed = folder.with_name(f".{folder.name}.removed.tmp")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def best_checkpoint(folders: list[Path]) -> Path | None:
    """The one with the lowest validation loss; None where no loss is known."""
    losses = {}
    for folder in folders:
        try:
            loss = Manifest.load(folder).state.get("val_loss")
        except CheckpointError:
            continue
        if loss is not None and math.isfinite(loss):  # NaN is less than nothing, and min would keep it
            losses[folder] = loss
    return min(losses, key=lambda f: losses[f]) if losses else None
