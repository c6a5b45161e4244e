"""Opens a session on all ranks and closes it whatever happens."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline import tracking
from pipeline.checkpoint.layout import published
from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.sections import Config
from pipeline.data.dataset import BatchReader, TokenDataset, ValidationWindows, open_splits, refuse_other_tokenizer
from pipeline.data.fingerprint import refuse_other_settings
from pipeline.data.layout import TOKENIZER
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, PipelineError, StopRequested
from pipeline.files import sha256_file
from pipeline.run.events import CheckpointRejected, Finished, Preempted, Resumed, Started
from pipeline.run.folder import Run, create_run, run_for
from pipeline.run.provenance import collect_provenance, current_image, refuse_other_image
from pipeline.run.world import World, world_from_environment
from pipeline.train.clock import StepClock
from pipeline.train.compile_cache import keep_compiled
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.fresh import INIT_VERSION
from pipeline.train.evaluate import Validation
from pipeline.train.guard import Guard
from pipeline.train.progress import Progress
from pipeline.train.ranks import group
from pipeline.train.ranks.device import pick_device
from pipeline.train.ranks.peers import Peers
from pipeline.train.ranks.preflight import preflight
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.recover import InitialWeights, Recovery, find_checkpoint, initial_weights
from pipeline.train.session import Session

# How often rank 0 looks whether another start has taken over the run, besides each save and each log line.
OWNER_S = 10.0


@contextlib.contextmanager
def open_session(config: Config, allow_image_change: bool = False) -> Iterator[Session]:
    """Yields a session ready for the next step: ranks joined, data open, the newest whole checkpoint loaded."""
    world = world_from_environment()
    device = pick_device(config, world)
    timeout = group.save_timeout(config.checkpoint)
    with StopRequest() as stop, group.process_group(world, device, timeout), _watched(world) as peers:
        session = _start(config, world, device, stop, allow_image_change)
        peers.at_exit = session.fail
        if world.is_first:
            peers.watch(session.saver.superseded, OWNER_S)
        with session.progress, _ended(session, peers):
            session.clock = StepClock()  # start-up is not part of the first step
            yield session


def _start(config: Config, world: World, device: torch.device, stop: StopRequest, allow_image_change: bool) -> Session:
    data, held_out = _open_data(config)
    train, context_length = config.train, config.model.context_length
    windows = ValidationWindows(held_out, context_length)
    count, chunk = train.num_val_batches * train.batch_size, train.micro_batch_size
    validation = Validation(held_out, windows, count, chunk, world, device)
    reader = BatchReader(data, config.data, seed=train.seed, context_length=context_length, batch_size=train.batch_size)
    begun = group.broadcast(bool(published(run_for(config).checkpoints)), world)
    initial = None if begun else initial_weights(config, data.manifest.tokenizer_digest, world)
    run = _shared_run(config, world, allow_image_change)
    if run.tokenizer_file.exists():
        refuse_other_tokenizer(data.path, data.manifest, sha256_file(run.tokenizer_file))
    preflight(config, world, device, run, data.manifest.digest)
    group.bind_device(device)
    torch.manual_seed(train.seed)
    engine = Engine(config, world, device)
    recovery = find_checkpoint(run.checkpoints, world)
    if recovery.checkpoint is None and initial is None:  # every checkpoint was damaged
        initial = initial_weights(config, data.manifest.tokenizer_digest, world)
    state = _fill(engine, recovery, initial, config, data.manifest.digest)
    step = state.get("step", 0)
    saver = _take_over(config, run, world, lambda saved: session.report_save(saved))
    saver.reserve(engine.fragments())
    group.set_timeout(group.save_timeout(config.checkpoint))
    tracker = _start_tracking(config, run, world, data, state, saver)
    progress = Progress(config.name, step, train.max_iters, enabled=world.is_first)
    session = Session(
        config=config,
        world=world,
        run=run,
        reader=reader,
        validation=validation,
        engine=engine,
        saver=saver,
        stop=stop,
        tracker=tracker,
        progress=progress,
        data_digest=data.manifest.digest,
        guard=Guard(config.guard, state.get("guard")),
        step=step,
        tokens_seen=state.get("tokens_seen", 0),
        initialization=state["initialization"],
        init=state.get("init"),
    )
    _announce(session, recovery)
    unused = config.model.vocab_size - data.manifest.vocab_size
    if unused > 0:
        progress.message(f"model.vocab_size is {unused} more than the tokenizer's: these tokens occur in no text")
    return session


def _open_data(config: Config) -> tuple[TokenDataset, TokenDataset]:
    """Returns the training and the validation split."""
    digest = None
    if config.tokenizer.kind == "file" and config.tokenizer.path is not None:
        digest = Tokenizer.load(config.tokenizer.path).digest
    path, vocab_size = config.data.path, config.model.vocab_size
    opened = open_splits(path, vocab_size=vocab_size, tokenizer_digest=digest, verify=config.data.verify)
    refuse_other_settings(path, opened["train"].manifest.settings, config)
    return opened["train"], opened["validation"]


def _shared_run(config: Config, world: World, allow_image_change: bool) -> Run:
    """Returns the run folder, which the first rank creates; if that fails, all ranks raise its error."""
    run, problem = None, None
    if world.is_first:
        try:
            if not allow_image_change:
                refuse_other_image(run_for(config).provenance(), current_image())
            run = create_run(config)
            if config.train.compile:
                keep_compiled(run.compiled)
        except PipelineError as error:
            problem = error
    run, problem = group.broadcast((run, problem), world)
    if problem is not None:
        raise problem
    assert run is not None
    if config.train.compile and not world.is_first:
        keep_compiled(run.compiled)
    return run


def _fill(
    engine: Engine, recovery: Recovery, initial: InitialWeights | None, config: Config, data_digest: str
) -> dict[str, Any]:
    """Loads the checkpoint if there is one, else the initial weights, else draws them; returns step and other state."""
    if recovery.checkpoint is None and initial is not None:
        engine.take(initial.weights)
        initial.weights.close()
        return {"initialization": INIT_VERSION, "init": initial.record}
    if recovery.checkpoint is None:
        engine.draw(config.train.seed)
        return {"initialization": INIT_VERSION}
    reader = CheckpointReader(recovery.checkpoint)
    trained_on = reader.manifest.state["dataset"]
    if trained_on != data_digest:
        raise DataError(
            f"{recovery.checkpoint}: was trained on the dataset {trained_on[:12]}, and data.path holds "
            f"{data_digest[:12]} now; restore that dataset, or give the new experiment another `name`"
        )
    engine.load(reader)
    reader.close()
    state = reader.manifest.state
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
    return {"initialization": 1, **state, "step": reader.manifest.step}  # the first version had no number


def _take_over(config: Config, run: Run, world: World, report: Callable[[Saved], None]) -> CheckpointSaver:
    """Takes the run over from any older start, which can publish no checkpoint from now on; returns our saver."""
    start_id = group.broadcast(secrets.token_hex(4), world)
    if world.is_first:
        take_over(run.checkpoints, start_id)
    group.barrier(world)
    identity = RankIdentity(world.rank, world.size, config.train.zero_stage, start_id, group.store())
    rollback_steps = config.guard.rollback_skip if config.guard.on_spike == "rollback" else 0
    return CheckpointSaver(run.checkpoints, identity, config.checkpoint, report, rollback_steps)


def _start_tracking(
    config: Config, run: Run, world: World, data: TokenDataset, state: dict[str, Any], saver: CheckpointSaver
) -> tracking.Tracker:
    provenance = group.gather(collect_provenance(), world)
    about = {**provenance[0], "hosts": sorted({p["host"] for p in provenance}), "dataset": data.manifest.digest}
    if state.get("init"):
        about["init"] = state["init"]
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
        step=state.get("step", 0),
        provenance=about,
        dataset=dataset,
        tokenizer_file=data.path / TOKENIZER,
        enabled=world.is_first,
        samples_node=world.local_rank == 0,
        superseded=lambda: saver.superseded() is not None,
    )


def _announce(session: Session, recovery: Recovery) -> None:
    for problem in recovery.rejected:
        session.tracker.event(CheckpointRejected(problem=problem))
        session.progress.message(f"a checkpoint was quarantined: {problem}")
    ready = Started if recovery.checkpoint is None else Resumed
    session.tracker.event(ready(step=session.step, world_size=session.world.size))
    if recovery.checkpoint is not None:
        session.progress.message(f"resuming from {recovery.checkpoint}")
    elif session.init is not None:
        session.progress.message(f"starting from {session.init['from']} (digest {session.init['digest'][:12]})")


@contextlib.contextmanager
def _watched(world: World) -> Iterator[Peers]:
    """Watches the other ranks; the error of the rank that failed first becomes the error of all."""
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
    """Records how training ended and closes tracking with the matching status."""
    try:
        yield
    except StopRequested:
        session.end(Preempted(step=session.step, reason=session.stop.reason), "STOPPED")
        raise
    except BaseException as error:
        session.fail(peers.cause_of(error) or _in_words(error))
        raise
    session.end(Finished(step=session.step), "FINISHED")


def _in_words(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"a library ended the process with status {error.code}"
    return str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
