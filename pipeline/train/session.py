"""One start of a run: what the loop holds while it trains, opened on all ranks and closed whatever happens."""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline import tracking
from pipeline.checkpoint import layout
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.write import CheckpointSaver, Saved, Writer, begin_attempt
from pipeline.config import Config
from pipeline.data.dataset import BatchReader, TokenDataset, ValidationWindows, open_dataset, validation_windows
from pipeline.data.manifest import TOKENIZER
from pipeline.errors import CheckpointError, PipelineError, StopRequested
from pipeline.files import sha256_file
from pipeline.model.flops import flops_per_token
from pipeline.model.transformer import TransformerLM
from pipeline.provenance import collect_provenance
from pipeline.run import Run, create_run
from pipeline.train import ranks
from pipeline.train.clock import StepClock
from pipeline.train.engine import Agreed, Engine, pick_device, process_group
from pipeline.train.evaluate import Evaluation, evaluate
from pipeline.train.hardware import peak_flops_per_s
from pipeline.train.peers import Peers
from pipeline.train.progress import Progress
from pipeline.train.recover import Recovery, find_checkpoint
from pipeline.train.stop import StopRequest
from pipeline.train.world import World, world_from_environment

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
        for start in range(first, first + share, size):
            x, y = self.reader.batch(step, start, start + size)
            yield x.to(self.engine.device, non_blocking=True), y.to(self.engine.device, non_blocking=True)

    def take_step(self, agreed: Agreed) -> None:
        """Moves the weights, unless a gradient is not finite: then the step is skipped, alike on all ranks."""
        if math.isfinite(agreed.norm):  # the one read of a step: a bad gradient must not reach the weights
            self.engine.step()
        else:
            self.engine.skip_step()
            self.tracker.event("bad_step", step=self.reached + 1, loss=float(agreed.loss), norm=float(agreed.norm))
            self.progress.message(f"step {self.reached + 1}: the gradient is not finite; the step is skipped")
        self.clock.step_done()

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


@contextlib.contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Everything ready for the next step: ranks joined, data open, the newest whole checkpoint loaded."""
    world = world_from_environment()
    device = pick_device(config, world)
    with StopRequest() as stop, process_group(world, device), _watched(world) as peers:
        session = _start(config, world, device, stop)
        peers.at_exit = session.fail
        with session.progress, _ended(session, peers):
            session.clock = StepClock()  # start-up is no part of the first step
            yield session


def _start(config: Config, world: World, device: torch.device, stop: StopRequest) -> Session:
    data = _open_data(config)
    windows = validation_windows(data["validation"], config.model.context_length)
    train = config.train
    reader = BatchReader(
        data["train"], config.data, seed=train.seed, context_length=config.model.context_length,
        batch_size=train.batch_size,
    )  # fmt: skip
    run = _shared_run(config, world)
    torch.manual_seed(train.seed)
    engine = Engine(TransformerLM(**config.model.model_dump()), config, world, device)
    recovery = find_checkpoint(run.checkpoints, world)
    state = _resume(engine, recovery)
    step = state.get("step", 0)
    attempt = ranks.broadcast(secrets.token_hex(4), world)
    if world.is_first:
        begin_attempt(run.checkpoints, attempt)
    ranks.barrier(world)
    session = Session(
        config=config,
        world=world,
        run=run,
        reader=reader,
        validation_data=data["validation"],
        windows=windows,
        engine=engine,
        saver=CheckpointSaver(
            run.checkpoints,
            Writer(world.rank, world.size, train.zero_stage, attempt),
            config.checkpoint,
            lambda saved: session.report_save(saved),
        ),
        stop=stop,
        tracker=_start_tracking(config, run, world, data["train"], step),
        progress=Progress(config.name, step, train.max_iters, enabled=world.is_first),
        step=step,
        tokens_seen=state.get("tokens_seen", 0),
        data_digest=data["train"].manifest.digest,
        reached=step,
    )
    _announce(session, recovery)
    return session


def _open_data(config: Config) -> dict[Literal["train", "validation"], TokenDataset]:
    path = config.data.path
    names: tuple[Literal["train", "validation"], ...] = ("train", "validation")
    return {
        name: open_dataset(path, name, vocab_size=config.model.vocab_size, verify=config.data.verify) for name in names
    }


def _shared_run(config: Config, world: World) -> Run:
    """The run folder, made by the first rank; its failure is everybody's."""
    run, problem = None, None
    if world.is_first:
        try:
            run = create_run(config)
        except PipelineError as error:
            problem = error
    run, problem = ranks.broadcast((run, problem), world)
    if problem is not None:
        raise problem
    assert run is not None
    if run.tokenizer_file.exists():
        _check_tokenizer(run, config)
    return run


def _check_tokenizer(run: Run, config: Config) -> None:
    open_dataset(config.data.path, "train", tokenizer_digest=sha256_file(run.tokenizer_file))


def _resume(engine: Engine, recovery: Recovery) -> dict[str, Any]:
    """Loads the checkpoint, if there is one; its step and the rest of its state."""
    if recovery.checkpoint is None:
        return {}
    reader = CheckpointReader(recovery.checkpoint)
    engine.load(reader)
    reader.close()
    state = reader.manifest.state
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
    return {**state, "step": reader.manifest.step}


def _start_tracking(config: Config, run: Run, world: World, data: TokenDataset, step: int) -> tracking.Tracker:
    provenance = ranks.gather(collect_provenance(), world)
    about = {**provenance[0], "hosts": sorted({p["host"] for p in provenance}), "dataset": data.manifest.digest}
    dataset = {
        "name": config.data.path,
        "digest": data.manifest.digest,
        "tokens": data.manifest.tokens,
        "documents": data.manifest.documents,
        "tokenizer": data.manifest.tokenizer_digest,
    }
    return tracking.start(
        run,
        config,
        step=step,
        provenance=about,
        dataset=dataset,
        tokenizer_file=data.path / TOKENIZER,
        enabled=world.is_first,
    )


def _announce(session: Session, recovery: Recovery) -> None:
    for problem in recovery.rejected:
        session.tracker.event("checkpoint_rejected", problem=problem)
        session.progress.message(f"a checkpoint was set aside: {problem}")
    kind = "resumed" if recovery.checkpoint is not None else "started"
    session.tracker.event(kind, step=session.step, world_size=session.world.size)
    if recovery.checkpoint is not None:
        session.progress.message(f"going on from {recovery.checkpoint}")


@contextlib.contextmanager
def _watched(world: World) -> Iterator[Peers]:
    """Watches the other ranks; the last words of the one that failed first become everybody's error."""
    peers = Peers(world)
    try:
        yield peers
    except StopRequested:
        peers.close()
        raise
    except BaseException as error:
        lost = peers.cause_of(error)
        if lost is not None:
            peers.close()
            raise PipelineError(lost) from error
        peers.close(str(error) or type(error).__name__)
        raise
    peers.close()


@contextlib.contextmanager
def _ended(session: Session, peers: Peers) -> Iterator[None]:
    """Ends tracking with the status that is true."""
    try:
        yield
    except StopRequested:
        session.tracker.event("preempted", step=session.reached, reason=session.stop.reason)
        session.tracker.close("STOPPED")
        raise
    except BaseException as error:
        session.fail(peers.cause_of(error) or f"{type(error).__name__}: {error}")
        raise
    session.tracker.event("finished", step=session.reached)
    session.tracker.close("FINISHED")
