"""Watching finished steps: which were skipped, which jumped, and whether somebody asked to stop."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import published
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.config.sections import Config
from pipeline.data.dataset import BatchReader
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.run.events import BadBatch, BadStep, Spike
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.train.engine.step_numbers import Agreed, Numbers
from pipeline.train.guard import Guard, data_index, record_batch
from pipeline.train.progress import Progress
from pipeline.train.ranks import group


@dataclass(frozen=True)
class Rollback:
    """Going back before a loss that jumped.

    Attributes:
        step: The one whose loss jumped.
        checkpoint: The folder to go on from.
    """

    step: int
    checkpoint: Path


@dataclass(frozen=True)
class Seen:
    """What the numbers that were read ask for, on all ranks alike.

    Attributes:
        rollback: How training has to go back; None if it need not.
        stop: Whether any rank was asked to stop.
    """

    rollback: Rollback | None = None
    stop: bool = False


@dataclass
class Watch:
    """Reads the numbers of each step when the next one has been launched: so the device never waits for the host.

    Attributes:
        saver: Writes the checkpoints that a rollback goes back to.
        guard: Decides; replaced after a rollback.
    """

    config: Config
    world: World
    run: Run
    reader: BatchReader
    tracker: tracking.Tracker
    progress: Progress
    saver: CheckpointSaver
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
            rollback = self._judge(finished, numbers)
            if rollback is not None:
                self._unread.clear()  # what came after it is undone
                return Seen(rollback)
        return Seen(stop=stop)

    def _judge(self, step: int, numbers: Numbers) -> Rollback | None:
        if self.guard.is_bad(numbers.loss, numbers.norm):
            self._report(BadStep, step, "loss or gradient is not finite; the step is skipped", numbers)
            self.guard.check_patience(self.run.bad_batches)
            return None
        if not self.guard.is_spike(numbers.loss):
            return None
        checkpoint = self._checkpoint_before(step) if self.config.guard.on_spike == "rollback" else None
        self._report(Spike, step, "the loss jumped" + ("; going back" if checkpoint else ""), numbers)
        if checkpoint is None:
            self.guard.accept(numbers.loss)
            return None
        return Rollback(step, checkpoint)

    def _checkpoint_before(self, step: int) -> Path | None:
        """The newest checkpoint whose weights no batch that a rollback leaves out has touched, if there is one."""
        # A save under way may publish this very checkpoint and delete an older one: looked at before it ends, the
        # folder says what the disk's speed makes of it, and what was found may be gone when it is loaded.
        self.saver.wait()
        newest = step - self.config.guard.rollback_skip
        found = published(self.run.checkpoints) if self.world.is_first else []
        fit = [folder for folder in found if (layout.step_of(folder) or 0) <= newest]
        return group.broadcast(fit[0] if fit else None, self.world, group.save_timeout(self.config.checkpoint))

    def leave_out(self, step: int, state: dict[str, Any]) -> None:
        """Goes back to the guard's state of a checkpoint, and leaves out the batches up to the jump at `step`."""
        culprits = range(step - self.config.guard.rollback_skip, step)
        bad = [data_index(s, self.guard.skipped) for s in culprits]
        skipped = self.guard.skipped
        self.guard = Guard(self.config.guard, state)
        self.guard.leave_out([*skipped, *bad])

    def _report(self, kind: type[BadBatch], step: int, what: str, numbers: Numbers) -> None:
        """Records the batch of a step that made trouble."""
        if not self.world.is_first:
            return
        index = data_index(step - 1, self.guard.skipped)
        event = kind(step=step, loss=str(numbers.loss), norm=str(numbers.norm), batch=index)
        try:
            path = record_batch(
                self.run.bad_batches,
                f"{kind.kind}_{step:08d}",
                self.reader,
                index,
                self.config.train.batch_size,
                Tokenizer.load(self.run.tokenizer_file, self.config.tokenizer.end_of_text),
                step=step,
                loss=numbers.loss,
                norm=numbers.norm,
            )
        except OSError as error:  # a full disk, say: training goes on without the record
            where = f"batch {index} could not be written to {self.run.bad_batches}: {error.strerror or error}"
            event = replace(event, error=where)
        else:
            where = f"the batch is in {path}"
            event = replace(event, path=str(path))
        self.tracker.event(event)
        self.progress.message(f"step {step}: {what} (loss {numbers.loss:.4g}, norm {numbers.norm:.4g}); {where}")
