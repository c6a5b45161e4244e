"""One start of a run: what the loop holds while it trains, opened on all ranks and closed whatever happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pipeline import tracking
from pipeline.checkpoint import layout
from pipeline.checkpoint.layout import published
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.write import CheckpointSaver, Saved
from pipeline.config import Config
from pipeline.data.dataset import BatchReader, TokenDataset, ValidationWindows
from pipeline.data.tokenizer import Tokenizer
from pipeline.errors import CheckpointError
from pipeline.model.flops import flops_per_token
from pipeline.run import Run
from pipeline.train import ranks
from pipeline.train.clock import StepClock
from pipeline.train.engine import Agreed, Engine
from pipeline.train.evaluate import Evaluation, evaluate
from pipeline.train.guard import Guard, data_index, record_batch
from pipeline.train.hardware import peak_flops_per_s
from pipeline.train.progress import Progress
from pipeline.train.recover import set_aside
from pipeline.train.stop import StopRequest
from pipeline.train.world import World

Batch = tuple[Tensor, Tensor]

# A save may wait for the file of a rank that is gone; the ranks that are left must not.
FAILED_SAVE_S = 5.0


def every(step: int, interval: int) -> bool:
    """Whether what is done at this interval is due after `step` finished steps."""
    return step % interval == 0


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
    guard: Guard
    clock: StepClock = field(default_factory=StepClock)
    saves: list[Saved] = field(default_factory=list)
    evaluation: Evaluation | None = None
    began: float = field(default_factory=time.monotonic)
    reached: int = 0

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of a step, on the device: rows of the global batch that no other rank takes."""
        share = self.config.train.batch_size // self.world.size
        size = self.config.train.micro_batch_size
        first = share * self.world.rank
        index = data_index(step, self.guard.skipped)
        for start in range(first, first + share, size):
            x, y = self.reader.batch(index, start, start + size)
            yield x.to(self.engine.device, non_blocking=True), y.to(self.engine.device, non_blocking=True)

    def take_step(self, agreed: Agreed) -> None:
        """Moves the weights, unless loss or gradient is not finite: then the step is skipped, alike on all ranks."""
        # The one place where the host waits for the device: a bad gradient must not reach the weights.
        loss, norm = agreed.on_host()
        if self.guard.is_bad(loss, norm):
            self.engine.skip_step()
            self._report_batch("bad_step", self.reached, "loss or gradient is not finite; the step is skipped", agreed)
            self.guard.check_patience(self.run.bad_batches)
        else:
            self.engine.step()
        self.clock.step_done()

    def spiked(self, step: int, agreed: Agreed) -> bool:
        """Whether the loss of a finished step jumped and training has to go back; also reports a jump."""
        loss, _ = agreed.on_host()
        if not self.guard.is_spike(loss):
            return False
        going_back = self.config.guard.on_spike == "rollback" and bool(self._checkpoints_before(step))
        self._report_batch("spike", step - 1, "the loss jumped" + ("; going back" if going_back else ""), agreed)
        return going_back

    def roll_back(self, step: int) -> int:
        """Goes back to the checkpoint before a spike and leaves its batches out; returns the step to go on from."""
        self.saver.wait()
        ranks.barrier(self.world)
        culprits = range(step - self.config.guard.rollback_skip, step)
        bad = [data_index(s, self.guard.skipped) for s in culprits]
        checkpoint = self._checkpoints_before(step)[0]
        reader = CheckpointReader(checkpoint)
        self.engine.load(reader)
        state = reader.manifest.state
        reader.close()
        skipped = self.guard.skipped
        self.guard = Guard(self.config.guard, state["guard"])
        self.guard.leave_out([*skipped, *bad])
        if self.world.is_first:
            for newer in published(self.run.checkpoints):
                if newer > checkpoint:
                    set_aside(newer)
        ranks.barrier(self.world)
        self.reached, self.tokens_seen = reader.manifest.step, state["tokens_seen"]
        self.tracker.event("rollback", step=step, to=self.reached, skipped=list(self.guard.skipped))
        self.tracker.rewind(self.reached)
        return self.reached

    def _checkpoints_before(self, step: int) -> list[Path]:
        """Published checkpoints, newest first, whose weights no batch that a rollback leaves out has touched."""
        newest = step - self.config.guard.rollback_skip
        found = published(self.run.checkpoints) if self.world.is_first else []
        return ranks.broadcast([f for f in found if (layout.step_of(f) or 0) <= newest], self.world)

    def _report_batch(self, kind: str, step: int, what: str, agreed: Agreed) -> None:
        """Records the batch of a step (from 0) that made trouble."""
        if not self.world.is_first:
            return
        loss, norm = agreed.on_host()
        index = data_index(step, self.guard.skipped)
        tokenizer = Tokenizer.load(self.run.tokenizer_file, self.config.tokenizer.end_of_text)
        path = record_batch(
            self.run.bad_batches,
            f"{kind}_{step + 1:08d}",
            self.reader,
            index,
            self.config.train.batch_size,
            tokenizer,
            step=step + 1,
            loss=loss,
            norm=norm,
        )
        self.tracker.event(kind, step=step + 1, loss=str(loss), norm=str(norm), batch=index, path=str(path))
        self.progress.message(f"step {step + 1}: {what} (loss {loss:.4g}, norm {norm:.4g}); the batch is in {path}")

    def log(self, step: int, lr: float, agreed: Agreed) -> None:
        """Counts a finished step, and records it where one is due."""
        train = self.config.train
        self.reached = step
        self.tokens_seen += train.batch_size * self.config.model.context_length
        self.progress.advance(step)
        if not (every(step, train.log_interval) or step in (1, train.max_iters)):
            return
        seconds = self.clock.read()
        rate = train.batch_size * self.config.model.context_length / seconds["step"]
        shape = self.config.model
        flops = rate * flops_per_token(
            shape.vocab_size, shape.context_length, shape.d_model, shape.num_layers, shape.d_ff
        )
        metrics = {
            "train/loss": float(agreed.loss),
            "train/lr": lr,
            "train/grad_norm": float(agreed.norm),
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
        self.stop.check_time(seconds["step"], max((s.seconds for s in self.saves), default=0.0))

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
            "guard": self.guard.state(),
            "val_loss": self.evaluation.loss if known and self.evaluation else None,
            "dataset": self.data_digest,
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
            "config": self.config.model_dump(mode="json"),
        }
        self.saver.save(step, self.engine.fragments(), state)
        self.clock.lap("checkpoint_stall")

    def wait_until_durable(self) -> None:
        """Waits for the save under way.

        Raises:
            CheckpointError: It failed; the one before it is still there.
        """
        self.saver.wait()
        error = ranks.broadcast(self.saves[-1].error if self.saves else None, self.world)
        if error is not None:
            raise CheckpointError(f"the last checkpoint could not be saved: {error}")

    def report_save(self, saved: Saved) -> None:
        """Records what came of a save; called from the saving thread of rank 0."""
        self.saves.append(saved)
        if saved.path is None:
            self.tracker.event("checkpoint_failed", step=saved.step, error=saved.error)
            self.progress.message(f"step {saved.step}: the checkpoint could not be saved: {saved.error}")
        else:
            fields = {"path": str(saved.path), "digest": layout.digest(saved.path), "seconds": round(saved.seconds, 3)}
            self.tracker.event("checkpointed", step=saved.step, **fields)

    def stop_message(self, step: int) -> str:
        """What a person is told who stopped the run."""
        reason = self.stop.reason or "another rank was asked"
        return f"stopped on request ({reason}) after step {step}; everything is saved: the same command goes on"

    def fail(self, why: str) -> None:
        """Records that training failed; a save under way is given a moment, for it may be whole already."""
        self.saver.wait(FAILED_SAVE_S)
        self.tracker.event("failed", step=self.reached, error=why)
        self.tracker.close("FAILED")

    def result(self) -> TrainResult:
        """What came of it; waits until the last checkpoint is durable."""
        self.wait_until_durable()
        return TrainResult(
            max(self.reached, self.step), self.evaluation, self.tokens_seen, time.monotonic() - self.began
        )
