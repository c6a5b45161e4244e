"""Guards against what ruins a run: gradients that are not finite, and losses that jump.

All ranks know the same losses and norms, so that each comes to the same decision on its own. The guard's memory is part
of the checkpoint: a resumed run decides like one that was never stopped.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.train_sections import GuardConfig
from pipeline.data.order.batches import BatchReader
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import PipelineError
from pipeline.files import write_json

_FEWEST = 20
_LEAST_SPREAD = 0.01


def data_index(step: int, skipped: Sequence[int]) -> int:
    """Returns the global batch that step `step` (from 0) trains on: the `step`-th index that is not skipped.

    Args:
        step: Number of earlier steps.
        skipped: Indices of skipped batches, in any order.
    """
    index = step
    for gap in sorted(skipped):
        if gap > index:
            break
        index += 1
    return index


class Guard:
    """Judges the losses and norms of one run.

    Args:
        config: The limits.
        state: `state()` from the checkpoint that the run resumes from; None for a fresh run.
    """

    def __init__(self, config: GuardConfig, state: dict[str, Any] | None = None) -> None:
        self._config = config
        state = state or {"losses": [], "skipped": [], "bad_in_a_row": 0, "bad_steps": 0}
        self._losses: deque[float] = deque(state["losses"], maxlen=config.spike_window)
        self._bad_in_a_row = int(state["bad_in_a_row"])
        self.skipped: tuple[int, ...] = tuple(state["skipped"])
        self.bad_steps = int(state["bad_steps"])

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as plain values."""
        return {
            "losses": list(self._losses),
            "skipped": list(self.skipped),
            "bad_in_a_row": self._bad_in_a_row,
            "bad_steps": self.bad_steps,
        }

    def is_bad(self, loss: float, norm: float) -> bool:
        """Counts and returns whether a step must be skipped because it is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self._bad_in_a_row = 0
            return False
        self.bad_steps += 1
        self._bad_in_a_row += 1
        return True

    def check_patience(self, where: Path) -> None:
        """Fails the run after too many bad steps in a row.

        Raises:
            PipelineError: There were `guard.max_bad_steps`; the message names the folder that holds the batches.
        """
        if self._bad_in_a_row >= self._config.max_bad_steps:
            raise PipelineError(
                f"loss or gradient was not finite in {self._bad_in_a_row} steps in a row (guard.max_bad_steps); "
                f"the batches are in {where}: lower optimizer.learning_rate, or look at the text"
            )

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss lies more than `spike_sigma` standard deviations above the window's mean.

        A normal loss enters the window; a spike does not, unless it is accepted.
        """
        if self._config.on_spike == "off" or not math.isfinite(loss):
            return False
        if len(self._losses) >= min(_FEWEST, self._config.spike_window):
            mean = statistics.fmean(self._losses)
            # In a window that hardly varies, a small rise must not count as a spike.
            spread = max(statistics.pstdev(self._losses), _LEAST_SPREAD * abs(mean))
            if loss > mean + self._config.spike_sigma * spread:
                return True
        self._losses.append(loss)
        return False

    def accept(self, loss: float) -> None:
        """Adds a spike to the window because training continues from it: a lasting rise is reported only once."""
        self._losses.append(loss)

    def skip_batches(self, indices: Iterable[int]) -> None:
        """Excludes these batches from training for good.

        Raises:
            PipelineError: More than `guard.max_rollbacks` rollbacks have skipped batches.
        """
        self.skipped = tuple(sorted({*self.skipped, *indices}))
        allowed = self._config.max_rollbacks * self._config.rollback_skip
        if len(self.skipped) > allowed:
            raise PipelineError(
                f"the loss jumps again after {self._config.max_rollbacks} rollbacks (guard.max_rollbacks): "
                "lower optimizer.learning_rate, or look at the text in bad_batches/"
            )


def record_batch(
    folder: Path, name: str, reader: BatchReader, index: int, batch_size: int, tokenizer: Tokenizer, **about: Any
) -> Path:
    """Writes a batch that caused trouble to a file and returns its path: each sample's origin and text.

    Args:
        folder: The run's folder of bad batches.
        name: File name without suffix.
        reader: Reads the training data.
        index: The global batch.
        batch_size: Samples in the batch.
        tokenizer: Decodes the samples.
        about: Further numbers: step, loss, norm.
    """
    x = reader.batch(index, 0, batch_size)[0]
    places = reader.describe(index, 0, batch_size)
    samples = [
        {"row": row, **place, "text": tokenizer.decode(ids)}
        for row, (place, ids) in enumerate(zip(places, x.tolist(), strict=True))
    ]
    path = folder / f"{name}.json"
    # JSON has no NaN: strict readers in other languages reject it.
    plain = {key: value if math.isfinite(value) else str(value) for key, value in about.items()}
    write_json(path, {**plain, "batch": index, "samples": samples})
    return path
