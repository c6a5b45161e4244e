"""One start of a run: everything that the loop holds while it trains."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline import tracking
from pipeline.checkpoint.pins import unpin
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.sections import Config
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.source_counts import SourceCounts
from pipeline.errors import CheckpointError
from pipeline.model.flops import flops_per_token
from pipeline.run import journal
from pipeline.run.events import Checkpointed, CheckpointFailed, Event, Failed
from pipeline.run.folder import Run
from pipeline.run.records import Origin
from pipeline.run.world import World
from pipeline.tracking.tracker import CloseStatus
from pipeline.train.clock import STALL, StepClock, every, longest_save_s
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.step_numbers import PendingNumbers
from pipeline.train.evaluate import Evaluation, Validation, evaluate
from pipeline.train.guard import Guard, data_index
from pipeline.train.profile.on_request import ProfileOnRequest
from pipeline.train.progress import Progress
from pipeline.train.ranks import group
from pipeline.train.ranks.activity import Activity, Roster
from pipeline.train.ranks.device import on_device, peak_flops_per_s
from pipeline.train.ranks.stop import StopRequest

# A save may be waiting for the file of a rank that is gone; the surviving ranks must not wait as long.
FAILED_SAVE_S = 5.0

# For a thread that is already writing the last records, with a tracking server that may be slow.
END_S = 35.0


@dataclass(frozen=True)
class TrainResult:
    """The outcome of training."""

    step: int
    """Finished steps."""
    evaluation: Evaluation | None
    """The last validation; None if this start ran none."""
    tokens_seen: int
    """Tokens trained on since the first start."""
    seconds: float
    """Wall time of this start."""


@dataclass
class Session:
    """What the loop holds while it trains; the only place of what changes from step to step."""

    config: Config
    world: World
    run: Run
    reader: BatchReader
    validation: Validation
    engine: Engine
    saver: CheckpointSaver
    stop: StopRequest
    """Whether this process was asked to stop."""
    activity: Activity
    """What this process is doing, as rank 0 and a profile see it."""
    roster: Roster
    """What all ranks are doing; complete on rank 0."""
    profile: ProfileOnRequest
    """Answers requests for a profile."""
    tracker: tracking.Tracker
    progress: Progress
    data_digest: str
    """Names the dataset in the checkpoints."""
    tokenizer_digest: str
    """Names the tokenizer in the checkpoints."""
    guard: Guard
    """Judges the numbers of each step; replaced by a rollback."""
    source_counts: SourceCounts
    """Tokens of each source that the run has trained on."""
    step: int
    """Finished steps."""
    tokens_seen: int
    """Tokens trained on since the first start."""
    initialization: int
    """Version of the numbers that the run's weights began with."""
    init: Origin | None = None
    """What the run started from; None if its weights were drawn."""
    pinned_in: Path | None = None
    """The folder of checkpoints that the run branched from; it may hold a pin until this run has saved."""
    unread: deque[tuple[int, PendingNumbers]] = field(default_factory=deque)
    """Steps whose numbers have not been read yet, oldest first."""
    evaluation: Evaluation | None = None
    """The last validation of this start."""
    saves: list[Saved] = field(default_factory=list)
    """Every save of this start that has ended."""
    clock: StepClock = field(default_factory=StepClock)
    """Where the seconds of a step go."""
    began: float = field(default_factory=time.monotonic)
    ended: bool = False
    ending: threading.Lock = field(default_factory=threading.Lock)

    def begin_step(self, step: int) -> None:
        """Notes that a step begins, and begins or ends a profile that was asked for."""
        self.profile.begin_step(step)
        self.activity.begin_step(step)

    def micro_batches(self, step: int) -> Iterator[tuple[Any, ...]]:
        """Yields this rank's micro-batches of a step, on the device: its own rows of the global batch.

        Each is what `Engine.loss` takes: token ids and targets and, where they are needed, document starts and weight.
        """
        share = self.config.train.batch_size // self.world.size
        size = self.config.train.micro_batch_size
        first = share * self.world.rank
        index = data_index(step, self.guard.skipped)
        for start in range(first, first + share, size):
            with self.activity.phase("data"):
                batch = self.reader.batch(index, start, start + size)
                x, y, *starts = (on_device(part, self.engine.device) for part in batch)
                weight = self.reader.weight(index, start, start + size)
            yield (x, y, *starts) if weight is None else (x, y, starts[0] if starts else None, weight)

    def log(self, step: int, lr: float, pending: PendingNumbers) -> None:
        """Counts a finished step, and records its metrics where a log line is due."""
        train, shape = self.config.train, self.config.model
        tokens = train.batch_size * shape.context_length
        self.step = step
        self.tokens_seen += tokens
        self.progress.advance(step)
        self.clock.step_done()
        self._check_time(step)
        if not (every(step, train.log_interval) or step in (1, train.max_iters)):
            return
        self.refuse_superseded()
        seconds = self.clock.read()
        rate = tokens / seconds["step"]
        flops = rate * flops_per_token(shape)
        numbers = pending.read()  # the host waits for the device here, once per log interval
        metrics = {
            "train/loss": numbers.loss,
            "train/lr": lr,
            "train/grad_norm": numbers.norm,
            "train/tokens_per_s": rate,
            "train/flops_per_s": flops,
            "train/tokens_seen": self.tokens_seen,
            **{f"data/{name}/tokens_seen": count for name, count in self._source_tokens().items()},
            **{f"time/{name}_s": value for name, value in seconds.items()},
        }
        peak = peak_flops_per_s(self.engine.device, train.precision)
        if peak is not None:
            metrics["train/mfu"] = flops / (peak * self.world.size)
        if self.world.is_first:
            metrics |= self.roster.metrics()
        self.tracker.log(step, metrics)
        self.progress.step(step, metrics)

    def _source_tokens(self) -> dict[str, int]:
        """Counts the tokens of each source up to this step, on the rank that records them."""
        skipped = self.guard.skipped
        return self.source_counts.before(data_index(self.step, skipped), skipped) if self.world.is_first else {}

    def refuse_superseded(self) -> None:
        """Ends this start if another one has taken over the run; the other ranks learn of it from rank 0.

        Raises:
            CheckpointError: Another start has.
        """
        lost = self.saver.superseded() if self.world.is_first else None
        if lost is not None:
            raise CheckpointError(lost)

    def _check_time(self, step: int) -> None:
        """Requests a stop while there is still time for it after the validations of this step and of the next.

        The next one counts because only a stop that the ranks have agreed on skips a validation, and a stop requested
        now is agreed on in the next step.
        """
        # Before the first validation: one step per batch is an upper estimate, because a step does more with a batch.
        estimate = self.config.train.num_val_batches * len(self.validation.sources) * self.clock.longest_step_s
        validation_s = self.clock.longest_pause_s or estimate
        due = sum(self.validation_due(s) for s in (step, step + 1))
        self.stop.check_time(self.clock.longest_step_s, longest_save_s(self.saves), due * validation_s)

    def validation_due(self, step: int) -> bool:
        """Whether a validation follows this step."""
        return every(step, self.config.train.val_interval) or step == self.config.train.max_iters

    def run_missed_validation(self) -> None:
        """Runs the validation that the previous start skipped in order to stop, on the same weights."""
        if self.step == 0 or not self.validation_due(self.step):
            return
        recorded = self.world.is_first and any(
            line.record["step"] == self.step and "val/loss" in line.record
            for line in journal.read(self.run.metrics_file)
        )
        if not group.broadcast(recorded, self.world):
            self.validate(self.step)

    def validate(self, step: int) -> None:
        """Evaluates the model on the validation windows and records the result."""
        self.engine.module.eval()
        with self.activity.phase("validation"):
            result = self.evaluation = evaluate(self.engine.loss, self.validation, step)
        self.engine.module.train()
        metrics = result.metrics()
        self.tracker.log(step, metrics)
        self.progress.step(step, metrics)
        self.clock.pause()

    def save(self, step: int) -> None:
        """Begins a checkpoint of this step, which is written while the loop continues."""
        self._source_tokens()
        fresh = self.evaluation if self.evaluation and self.evaluation.step == step else None
        state = {
            "optimizer_steps": self.engine.optimizer_steps,
            "tokens_seen": self.tokens_seen,
            "source_tokens": self.source_counts.state(),
            "initialization": self.initialization,
            "init": self.init,
            "guard": self.guard.state(),
            "val_loss": fresh.loss if fresh else None,
            "dataset": self.data_digest,
            "tokenizer": self.tokenizer_digest,
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
            "config": self.config.model_dump(mode="json"),
            "mlflow_run_id": self.tracker.mlflow_run_id(),
        }
        with self.activity.phase("checkpoint"):
            self.saver.save(step, self.engine.fragments(), state)
        self.clock.lap(STALL)

    def wait_until_durable(self) -> None:
        """Waits for the save in progress.

        Raises:
            CheckpointError: It failed; the previous checkpoint is still there.
        """
        with self.activity.phase("checkpoint"):
            self.saver.wait()
            error = self.saves[-1].error if self.saves else None
            error = group.broadcast(error, self.world, group.save_timeout(self.config.checkpoint))
            group.barrier(self.world)  # rank 0 takes the store, from which its peers read, with it when it leaves
        if error is not None:
            raise CheckpointError(f"the last checkpoint could not be saved: {error}")

    def report_save(self, saved: Saved) -> None:
        """Records the outcome of a save; called from the saving thread of rank 0."""
        self.saves.append(saved)
        if saved.path is None and self.saver.superseded() is not None:
            return  # the error is that of the start itself, which ends
        if saved.path is None:
            self.tracker.event(CheckpointFailed(step=saved.step, error=saved.error))
            self.progress.message(f"step {saved.step}: the checkpoint could not be saved: {saved.error}")
        else:
            path, seconds = str(saved.path), round(saved.seconds, 3)
            self.tracker.event(Checkpointed(step=saved.step, path=path, digest=saved.digest, seconds=seconds))
            self.release_parent()

    def release_parent(self) -> None:
        """Lets the run that this one branched from delete the checkpoint; from now on this run has its own (rank 0)."""
        if self.world.is_first and self.pinned_in is not None:
            unpin(self.pinned_in, self.run.path)
            self.pinned_in = None

    def fail(self, why: str) -> None:
        """Records that training failed; a save in progress is given a moment, because it may be whole already."""
        self.saver.wait(FAILED_SAVE_S)
        self.end(Failed(step=self.step, error=why), "FAILED")

    def end(self, event: Event, status: CloseStatus) -> None:
        """Records how this start ended, once: the thread that watches the other ranks may call it too.

        Returns when the end is recorded, or after `END_S` if another thread is still recording it.
        """
        if not self.ending.acquire(timeout=END_S):
            return
        try:
            if not self.ended:
                self.ended = True
                self.tracker.event(event)
                self.tracker.close(status)
        finally:
            self.ending.release()

    def result(self) -> TrainResult:
        """Returns the outcome once the last checkpoint is durable."""
        self.wait_until_durable()
        return TrainResult(self.step, self.evaluation, self.tokens_seen, time.monotonic() - self.began)
