"""One start of a run: what the loop holds while it trains, opened on all ranks and closed whatever happens."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline import tracking
from pipeline.checkpoint.layout import published
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.sections import Config
from pipeline.data.dataset import BatchReader, TokenDataset, ValidationWindows
from pipeline.errors import CheckpointError
from pipeline.model.flops import flops_per_token
from pipeline.run import journal
from pipeline.run.events import Checkpointed, CheckpointFailed, Event, Failed, RolledBack
from pipeline.run.folder import Run
from pipeline.run.world import World
from pipeline.tracking.tracker import CloseStatus
from pipeline.train.clock import StepClock, longest_save_s
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.step_numbers import Agreed
from pipeline.train.evaluate import Evaluation, evaluate
from pipeline.train.guard import data_index
from pipeline.train.incidents import Rollback, Seen, Watch
from pipeline.train.progress import Progress
from pipeline.train.ranks import group
from pipeline.train.ranks.device import peak_flops_per_s
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.recover import set_aside

Batch = tuple[Tensor, Tensor]

# A save may wait for the file of a rank that is gone; the ranks that are left must not.
FAILED_SAVE_S = 5.0

# For a thread that is at the last records already, with a tracking server that may take its time.
END_S = 35.0


def every(step: int, interval: int) -> bool:
    """Whether what is done at this interval is due after `step` finished steps."""
    return step % interval == 0


def on_device(tokens: Tensor, device: torch.device) -> Tensor:
    """A copy there, or the same tensor; out of pinned memory, for a copy out of any other may be waited for."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


@dataclass(frozen=True)
class TrainResult:
    """What came of training.

    Attributes:
        step: Finished steps.
        evaluation: The last validation; None if this start made none.
        tokens_seen: Tokens trained on since the first start.
        seconds: Wall time of this start.
    """

    step: int
    evaluation: Evaluation | None
    tokens_seen: int
    seconds: float


@dataclass
class Session:
    """What the loop holds while it trains.

    Attributes:
        step: Finished steps before this start.
        engine: The model in training.
        saver: Writes checkpoints.
        stop: Whether this process was asked to stop.
        clock: Where the seconds of a step go.
        progress: What a person sees.
        tracker: Records metrics and events.
    """

    config: Config
    world: World
    run: Run
    reader: BatchReader
    validation_data: TokenDataset
    windows: ValidationWindows
    engine: Engine
    saver: CheckpointSaver
    stop: StopRequest
    tracker: tracking.Tracker
    progress: Progress
    step: int
    tokens_seen: int
    data_digest: str
    watch: Watch
    clock: StepClock = field(default_factory=StepClock)
    saves: list[Saved] = field(default_factory=list)
    evaluation: Evaluation | None = None
    began: float = field(default_factory=time.monotonic)
    reached: int = 0
    ended: bool = False
    ending: threading.Lock = field(default_factory=threading.Lock)

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of a step, on the device: rows of the global batch that no other rank takes."""
        share = self.config.train.batch_size // self.world.size
        size = self.config.train.micro_batch_size
        first = share * self.world.rank
        index = data_index(step, self.watch.guard.skipped)
        for start in range(first, first + share, size):
            x, y = self.reader.batch(index, start, start + size)
            yield on_device(x, self.engine.device), on_device(y, self.engine.device)

    def look(self, step: int, agreed: Agreed) -> Seen:
        """Looks at the numbers of the step before, and at this one's where something is due that needs them."""
        train = self.config.train
        intervals = (train.log_interval, train.val_interval, train.checkpoint_interval)
        return self.watch.look(step, agreed, step == train.max_iters or any(every(step, i) for i in intervals))

    def roll_back(self, rollback: Rollback) -> int:
        """Goes back to the checkpoint before a jump and leaves its batches out; the step to go on from."""
        reader = CheckpointReader(rollback.checkpoint)
        self.engine.load(reader)
        state = reader.manifest.state
        reader.close()
        self.watch.leave_out(rollback.step, state["guard"])
        if self.world.is_first:
            for newer in published(self.run.checkpoints):
                if newer > rollback.checkpoint:
                    set_aside(newer)
        group.barrier(self.world)
        self.reached, self.tokens_seen = reader.manifest.step, state["tokens_seen"]
        skipped = list(self.watch.guard.skipped)
        self.tracker.event(RolledBack(step=rollback.step, to=self.reached, skipped=skipped))
        self.tracker.rewind(self.reached)
        return self.reached

    def log(self, step: int, lr: float, agreed: Agreed) -> None:
        """Counts a finished step, and records it where one is due."""
        train = self.config.train
        self.reached = step
        self.tokens_seen += train.batch_size * self.config.model.context_length
        self.progress.advance(step)
        self.clock.step_done()
        self._check_time(step)
        if not (every(step, train.log_interval) or step in (1, train.max_iters)):
            return
        seconds = self.clock.read()
        rate = train.batch_size * self.config.model.context_length / seconds["step"]
        shape = self.config.model
        flops = rate * flops_per_token(
            shape.vocab_size, shape.context_length, shape.d_model, shape.num_layers, shape.d_ff
        )
        numbers = agreed.read()  # the host waits here, as far as the interval goes
        metrics = {
            "train/loss": numbers.loss,
            "train/lr": lr,
            "train/grad_norm": numbers.norm,
            "train/tokens_per_s": rate,
            "train/flops_per_s": flops,
            "train/tokens_seen": self.tokens_seen,
            **{f"time/{name}_s": value for name, value in seconds.items()},
        }
        peak = peak_flops_per_s(self.engine.device)
        if peak is not None:
            metrics["train/mfu"] = flops / (peak * self.world.size)
        self.tracker.log(step, metrics)
        self.progress.step(step, metrics)

    def _check_time(self, step: int) -> None:
        """Asks to stop while there is time for it, with the validation of this step.

        That of the next one is reckoned too: it is left out only if the ranks agree in that step, so if asked now.
        """
        # As long as none was measured: as many steps as it has batches, for a step does more with a batch.
        validation_s = self.clock.longest_pause_s or self.config.train.num_val_batches * self.clock.step_s
        due = sum(self.validation_due(s) for s in (step, step + 1))
        self.stop.check_time(self.clock.step_s, longest_save_s(self.saves), due * validation_s)

    def validation_due(self, step: int) -> bool:
        """Whether there is a validation after this step."""
        return every(step, self.config.train.val_interval) or step == self.config.train.max_iters

    def make_up_validation(self) -> None:
        """Makes the validation that the start before left out, because it was asked to stop, on the same weights."""
        if self.step == 0 or not self.validation_due(self.step):
            return
        there = self.world.is_first and any(
            line.record["step"] == self.step and "val/loss" in line.record
            for line in journal.read(self.run.metrics_file)
        )
        if not group.broadcast(there, self.world):
            self.validate(self.step)

    def validate(self, step: int) -> None:
        """Evaluates on the first `num_val_batches` batches of validation windows."""
        train = self.config.train
        self.engine.module.eval()
        self.evaluation = evaluate(
            self.engine,
            self.validation_data,
            self.windows,
            step=step,
            count=train.num_val_batches * train.batch_size,
            chunk=train.micro_batch_size,
            context_length=self.config.model.context_length,
            world=self.world,
            device=self.engine.device,
        )
        self.engine.module.train()
        result = self.evaluation
        metrics = {
            "val/loss": result.loss,
            "val/perplexity": result.perplexity,
            "val/bits_per_byte": result.bits_per_byte,
        }
        self.tracker.log(step, metrics)
        self.progress.step(step, metrics)
        self.clock.pause()

    def save(self, step: int) -> None:
        """Begins a checkpoint of this step; the loop goes on while it is written."""
        known = self.evaluation is not None and self.evaluation.step == step
        state = {
            "optimizer_steps": self.engine.optimizer_steps,
            "tokens_seen": self.tokens_seen,
            "guard": self.watch.guard.state(),
            "val_loss": self.evaluation.loss if known and self.evaluation else None,
            "dataset": self.data_digest,
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
            "config": self.config.model_dump(mode="json"),
            "mlflow_run_id": self.tracker.mlflow_run_id(),
        }
        self.saver.save(step, self.engine.fragments(), state)
        self.clock.lap("checkpoint_stall")

    def wait_until_durable(self) -> None:
        """Waits for the save under way.

        Raises:
            CheckpointError: It failed; the one before it is still there.
        """
        self.saver.wait()
        error = self.saves[-1].error if self.saves else None
        error = group.broadcast(error, self.world, group.save_timeout(self.config.checkpoint))
        if error is not None:
            raise CheckpointError(f"the last checkpoint could not be saved: {error}")

    def report_save(self, saved: Saved) -> None:
        """Records what came of a save; called from the saving thread of rank 0."""
        self.saves.append(saved)
        if saved.path is None:
            self.tracker.event(CheckpointFailed(step=saved.step, error=saved.error))
            self.progress.message(f"step {saved.step}: the checkpoint could not be saved: {saved.error}")
        else:
            seconds = round(saved.seconds, 3)
            made = Checkpointed(step=saved.step, path=str(saved.path), digest=saved.digest, seconds=seconds)
            self.tracker.event(made)

    def stop_message(self, step: int) -> str:
        """What a person is told who stopped the run."""
        reason = self.stop.reason or "another rank was asked"
        return f"stopped on request ({reason}) after step {step}; everything is saved: the same command goes on"

    def fail(self, why: str) -> None:
        """Records that training failed; a save under way is given a moment, for it may be whole already."""
        self.saver.wait(FAILED_SAVE_S)
        self.end(Failed(step=self.reached, error=why), "FAILED")

    def end(self, event: Event, status: CloseStatus) -> None:
        """Records how this start ended, once: the watch over the other ranks may come to it beside the main thread.

        Returns when that is done, or after `END_S` if another thread does not get done with it.
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
        """What came of it; waits until the last checkpoint is durable."""
        self.wait_until_durable()
        return TrainResult(
            max(self.reached, self.step), self.evaluation, self.tokens_seen, time.monotonic() - self.began
        )
