"""Which checkpoints are kept: the newest, every K-th forever, the best, one for a rollback, and those with a pin."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from pipeline.checkpoint.layout import Manifest, UnreadableCheckpoint, published, step_of
from pipeline.checkpoint.pins import pins
from pipeline.config.train_sections import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.files import discard

_log = logging.getLogger("pipeline.checkpoint")


class Retention:
    """Deletes the checkpoints that the policy does not keep.

    It remembers the validation losses: at a thousand ranks a manifest is tens of megabytes, and reading the manifests
    of all kept checkpoints after every save would stall training. Each manifest of an earlier start is read once.

    Args:
        checkpoints: The folder of the run's checkpoints.
        config: The policy.
        rollback_steps: How many steps before the newest checkpoint a rollback may have to start from.
        interval: Steps between two checkpoints, but for those of a stop.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig, rollback_steps: int = 0, interval: int = 1) -> None:
        self._checkpoints = checkpoints
        self._config = config
        self._rollback_steps = rollback_steps
        self._interval = interval
        self._losses: dict[Path, float | None] = {}
        self._told: set[Path] = set()

    def remove_old(self, newest: Path, val_loss: float | None) -> None:
        """Deletes old checkpoints, and what an interrupted deletion left.

        Args:
            newest: The checkpoint that was just published.
            val_loss: Its validation loss, if known.
        """
        self._losses[newest] = val_loss
        for leftover in self._checkpoints.glob(".step_*.removed.tmp"):
            discard(leftover)
        folders = published(self._checkpoints)
        kept = self._kept(folders)
        for folder in [f for f in folders if f not in kept]:
            # Renamed first: an interrupted deletion must not leave a checkpoint that looks published.
            doomed = folder.with_name(f".{folder.name}.removed.tmp")
            folder.rename(doomed)
            if folder in self._pinned():  # at this very moment: whoever pinned it now looks whether it is still there
                doomed.rename(folder)
                continue
            discard(doomed)

    def _kept(self, folders: list[Path]) -> set[Path]:
        steps = {folder: step_of(folder) or 0 for folder in folders}
        kept = self._newest(folders)
        if self._rollback_steps:
            # A checkpoint of a stop must not displace one that a run without stops has: a rollback must find the same.
            kept |= self._newest([f for f in folders if steps[f] % self._interval == 0])
        if self._config.keep_every:
            kept |= {f for f in folders if steps[f] % self._config.keep_every == 0}
        if self._config.keep_best:
            kept |= set(self._best(folders))
        return kept | self._pinned()

    def _newest(self, folders: list[Path]) -> set[Path]:
        """Returns the newest of these, as many as the policy says and a rollback needs."""
        steps = [step_of(folder) or 0 for folder in folders]
        # A spike is noticed after the newest save, so a rollback never starts before step `earliest`: the newest
        # checkpoint up to that step is kept, and so are all younger ones. Were they deleted early, none would reach
        # that age, and the same old checkpoint would serve every rollback.
        earliest = max(steps, default=0) - self._rollback_steps
        too_young = sum(step > earliest for step in steps)
        return set(folders[: max(self._config.keep_last, too_young + 1)])

    def _pinned(self) -> set[Path]:
        """Returns the checkpoints that another run or a job holds; reports each pin that counts no longer once."""
        found = pins(self._checkpoints)
        for pin in found:
            if pin.dead is not None and pin.file not in self._told:
                self._told.add(pin.file)
                _log.warning("%s: no longer protects its checkpoint: %s; remove the file", pin.file, pin.dead)
        return {pin.checkpoint for pin in found if pin.dead is None}

    def _best(self, folders: list[Path]) -> list[Path]:
        """Returns the checkpoint with the lowest validation loss; empty if no loss is known."""
        losses = {folder: loss for folder in folders if (loss := self._loss(folder)) is not None}
        return [min(losses, key=lambda f: losses[f])] if losses else []

    def _loss(self, folder: Path) -> float | None:
        if folder not in self._losses:
            try:
                self._losses[folder] = Manifest.load(folder).state.get("val_loss")
            except UnreadableCheckpoint:  # it may be the best: nothing is deleted until that is known
                raise
            except CheckpointError:
                self._losses[folder] = None
        loss = self._losses[folder]
        return loss if loss is not None and math.isfinite(loss) else None  # min() would keep a NaN: no number is less
