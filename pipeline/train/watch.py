"""Watching finished steps: which were skipped, which jumped, and whether somebody asked to stop."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import published
from pipeline.config import Config
from pipeline.data.dataset import BatchReader
from pipeline.data.tokenizer import Tokenizer
from pipeline.run import Run
from pipeline.train import ranks
from pipeline.train.agreed import Agreed, Numbers
from pipeline.train.guard import Guard, data_index, record_batch
from pipeline.train.progress import Progress
from pipeline.train.world import World


@dataclass(frozen=True)
class Seen:
    """What the numbers that were read ask for, on all ranks alike.

    Attributes:
        spike: The step whose loss jumped, if training has to go back before it.
        stop: Whether any rank was asked to stop.
    """

    spike: int | None = None
    stop: bool = False


@dataclass
class Watch:
    """Reads the numbers of each step when the next one has been launched: so the device never waits for the host.

    Attributes:
        guard: Decides; replaced after a rollback.
    """

    config: Config
    world: World
    run: Run
    reader: BatchReader
    tracker: tracking.Tracker
    progress: Progress
    guard: Guard

    def __post_init__(self) -> None:
        self._unread: deque[tuple[int, Agreed]] = deque()

    def look(self, step: int, agreed: Agreed, at_once: bool) -> Seen:
        """Takes the numbers of a finished step and looks at those of the step before.

        Args:
            step: Finished steps.
            agreed: The numbers of the last one.
            at_once: Look at these too, because something is due that needs them. A stop is such a thing itself.

        Raises:
            PipelineError: Too many steps in a row were not finite.
        """
        self._unread.append((step, agreed))
        stop = False
        while len(self._unread) > 1 or (self._unread and (at_once or stop)):
            finished, numbers = self._unread[0][0], self._unread.popleft()[1].read()
            stop = stop or numbers.stop
            if self._goes_back(finished, numbers):
                self._unread.clear()  # what came after it is undone
                return Seen(spike=finished)
        return Seen(stop=stop)

    def _goes_back(self, step: int, numbers: Numbers) -> bool:
        if self.guard.is_bad(numbers.loss, numbers.norm):
            self._report("bad_step", step, "loss or gradient is not finite; the step is skipped", numbers)
            self.guard.check_patience(self.run.bad_batches)
            return False
        if not self.guard.is_spike(numbers.loss):
            return False
        going_back = self.config.guard.on_spike == "rollback" and bool(self.checkpoints_before(step))
        self._report("spike", step, "the loss jumped" + ("; going back" if going_back else ""), numbers)
        return going_back

    def checkpoints_before(self, step: int) -> list[Path]:
        """Published checkpoints, newest first, whose weights no batch that a rollback leaves out has touched."""
        newest = step - self.config.guard.rollback_skip
        found = published(self.run.checkpoints) if self.world.is_first else []
        return ranks.broadcast([f for f in found if (layout.step_of(f) or 0) <= newest], self.world)

    def leave_out(self, step: int, state: dict[str, Any]) -> None:
        """Goes back to the guard's state of a checkpoint, and leaves out the batches up to the jump at `step`."""
        culprits = range(step - self.config.guard.rollback_skip, step)
        bad = [data_index(s, self.guard.skipped) for s in culprits]
        skipped = self.guard.skipped
        self.guard = Guard(self.config.guard, state)
        self.guard.leave_out([*skipped, *bad])

    def _report(self, kind: str, step: int, what: str, numbers: Numbers) -> None:
        """Records the batch of a step that made trouble."""
        if not self.world.is_first:
            return
        index = data_index(step - 1, self.guard.skipped)
        path = record_batch(
            self.run.bad_batches,
            f"{kind}_{step:08d}",
            self.reader,
            index,
            self.config.train.batch_size,
            Tokenizer.load(self.run.tokenizer_file, self.config.tokenizer.end_of_text),
            step=step,
            loss=numbers.loss,
            norm=numbers.norm,
        )
        found = {"loss": str(numbers.loss), "norm": str(numbers.norm), "batch": index, "path": str(path)}
        self.tracker.event(kind, step=step, **found)
        self.progress.message(
            f"step {step}: {what} (loss {numbers.loss:.4g}, norm {numbers.norm:.4g}); the batch is in {path}"
        )
