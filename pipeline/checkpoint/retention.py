"""Which checkpoints stay: the newest, every K-th for ever, the best by validation loss, and one for a rollback."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from pipeline.checkpoint.layout import Manifest, published, step_of
from pipeline.config.sections import CheckpointConfig
from pipeline.errors import CheckpointError


class Retention:
    """Deletes what the policy does not keep.

    It remembers the validation losses: at a thousand ranks a manifest is tens of megabytes, and reading those of all
    kept checkpoints after every save would hold training up. Each one of an earlier start is read once.

    Args:
        checkpoints: The folder of the run's checkpoints.
        config: The policy.
        rollback_steps: How many steps before the newest checkpoint a rollback may have to go back to.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig, rollback_steps: int = 0) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._rollback_steps = rollback_steps
        self._losses: dict[Path, float | None] = {}

    def remove_old(self, newest: Path, val_loss: float | None) -> list[Path]:
        """Deletes old checkpoints, and what an earlier deletion left.

        Args:
            newest: Was just published.
            val_loss: Its validation loss, where it is known.

        Returns:
            The folders that were deleted.
        """
        self._losses[newest] = val_loss
        for leftover in self._checkpoints.glob(".step_*.removed.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        folders = published(self._checkpoints)
        kept = self._kept(folders, step_of(newest) or 0)
        removed = [f for f in folders if f not in kept]
        for folder in removed:
            # Renamed first: a deletion cut short must not leave a checkpoint that looks published.
            doomed = folder.with_name(f".{folder.name}.removed.tmp")
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        return removed

    def _kept(self, folders: list[Path], newest: int) -> set[Path]:
        steps = {folder: step_of(folder) or 0 for folder in folders}
        # A jump is seen after the newest, so that a rollback never goes back before `last`. All that are younger stay
        # too: deleted at once, none would ever get that old, and the one for a rollback would stay the same for ever.
        last = newest - self._rollback_steps
        too_young = sum(steps[folder] > last for folder in folders)
        kept = set(folders[: max(self._config.keep_last, too_young + 1)])
        if self._config.keep_every:
            kept |= {f for f in folders if steps[f] % self._config.keep_every == 0}
        if self._config.keep_best:
            kept |= set(self._best(folders))
        return kept

    def _best(self, folders: list[Path]) -> list[Path]:
        """The one with the lowest validation loss; none where no loss is known."""
        losses = {folder: loss for folder in folders if (loss := self._loss(folder)) is not None}
        return [min(losses, key=lambda f: losses[f])] if losses else []

    def _loss(self, folder: Path) -> float | None:
        if folder not in self._losses:
            try:
                self._losses[folder] = Manifest.load(folder).state.get("val_loss")
            except CheckpointError:
                self._losses[folder] = None
        loss = self._losses[folder]
        return loss if loss is not None and math.isfinite(loss) else None  # NaN is less than nothing: min keeps it
