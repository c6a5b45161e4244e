"""Opening a session on all ranks, and closing it whatever happens."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import torch

from pipeline import tracking
from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.config.sections import Config
from pipeline.data.dataset import BatchReader, TokenDataset, open_splits, refuse_other_tokenizer, validation_windows
from pipeline.data.fingerprint import refuse_other_settings
from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import SplitName
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError, PipelineError, StopRequested
from pipeline.files import sha256_file
from pipeline.run.events import CheckpointRejected, Finished, Preempted, Resumed, Started
from pipeline.run.folder import Run, create_run, run_for
from pipeline.run.provenance import collect_provenance, current_image, refuse_other_image
from pipeline.run.world import World, world_from_environment
from pipeline.train.clock import StepClock
from pipeline.train.engine.engine import Engine
from pipeline.train.guard import Guard
from pipeline.train.incidents import Watch
from pipeline.train.model import build_model
from pipeline.train.progress import Progress
from pipeline.train.ranks import group
from pipeline.train.ranks.device import pick_device
from pipeline.train.ranks.peers import Peers
from pipeline.train.ranks.preflight import preflight
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.recover import Recovery, find_checkpoint
from pipeline.train.session import Session


@contextlib.contextmanager
def open_session(config: Config, allow_image_change: bool = False) -> Iterator[Session]:
    """Everything ready for the next step: ranks joined, data open, the newest whole checkpoint loaded."""
    world = world_from_environment()
    device = pick_device(config, world)
    with StopRequest() as stop, group.process_group(world, device), _watched(world) as peers:
        session = _start(config, world, device, stop, allow_image_change)
        peers.at_exit = session.fail
        with session.progress, _ended(session, peers):
            session.clock = StepClock()  # start-up is no part of the first step
            yield session


def _start(config: Config, world: World, device: torch.device, stop: StopRequest, allow_image_change: bool) -> Session:
    data = _open_data(config)
    windows = validation_windows(data["validation"], config.model.context_length)
    train = config.train
    reader = BatchReader(
        data["train"], config.data, seed=train.seed, context_length=config.model.context_length,
        batch_size=train.batch_size,
    )  # fmt: skip
    run = _shared_run(config, world, allow_image_change)
    if run.tokenizer_file.exists():
        refuse_other_tokenizer(config.data.path, data["train"].manifest, sha256_file(run.tokenizer_file))
    preflight(config, world, device, run, data["train"].manifest.digest)
    torch.manual_seed(train.seed)
    engine = Engine(build_model(config), config, world, device)
    recovery = find_checkpoint(run.checkpoints, world)
    state = _resume(engine, recovery, data["train"].manifest.digest)
    step = state.get("step", 0)
    start_id = group.broadcast(secrets.token_hex(4), world)
    if world.is_first:
        take_over(run.checkpoints, start_id)
    group.barrier(world)
    tracker = _start_tracking(config, run, world, data["train"], step)
    progress = Progress(config.name, step, train.max_iters, enabled=world.is_first)
    identity = RankIdentity(world.rank, world.size, train.zero_stage, start_id, group.store())
    saver = CheckpointSaver(
        run.checkpoints,
        identity,
        config.checkpoint,
        lambda saved: session.report_save(saved),
        rollback_steps=config.guard.rollback_skip if config.guard.on_spike == "rollback" else 0,
    )
    session = Session(
        config=config,
        world=world,
        run=run,
        reader=reader,
        validation_data=data["validation"],
        windows=windows,
        engine=engine,
        saver=saver,
        stop=stop,
        tracker=tracker,
        progress=progress,
        watch=Watch(config, world, run, reader, tracker, progress, saver, Guard(config.guard, state.get("guard"))),
        step=step,
        tokens_seen=state.get("tokens_seen", 0),
        data_digest=data["train"].manifest.digest,
        reached=step,
    )
    _announce(session, recovery)
    return session


def _open_data(config: Config) -> dict[SplitName, TokenDataset]:
    path = config.data.path
    wanted = None
    if config.tokenizer.kind == "file" and config.tokenizer.path is not None:
        wanted = Tokenizer.load(config.tokenizer.path).digest
    opened = open_splits(path, vocab_size=config.model.vocab_size, tokenizer_digest=wanted, verify=config.data.verify)
    refuse_other_settings(path, opened["train"].manifest.settings, config)
    return opened


def _shared_run(config: Config, world: World, allow_image_change: bool) -> Run:
    """The run folder, made by the first rank; its failure is everybody's."""
    run, problem = None, None
    if world.is_first:
        try:
            if not allow_image_change:
                refuse_other_image(run_for(config).provenance(), current_image())
            run = create_run(config)
        except PipelineError as error:
            problem = error
    run, problem = group.broadcast((run, problem), world)
    if problem is not None:
        raise problem
    assert run is not None
    return run


def _resume(engine: Engine, recovery: Recovery, data_digest: str) -> dict[str, Any]:
    """Loads the checkpoint, if there is one; its step and the rest of its state."""
    if recovery.checkpoint is None:
        return {}
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
    return {**state, "step": reader.manifest.step}


def _start_tracking(config: Config, run: Run, world: World, data: TokenDataset, step: int) -> tracking.Tracker:
    provenance = group.gather(collect_provenance(), world)
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
        samples_node=world.local_rank == 0,
    )


def _announce(session: Session, recovery: Recovery) -> None:
    for problem in recovery.rejected:
        session.tracker.event(CheckpointRejected(problem=problem))
        session.progress.message(f"a checkpoint was set aside: {problem}")
    ready = Started if recovery.checkpoint is None else Resumed
    session.tracker.event(ready(step=session.step, world_size=session.world.size))
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
        session.end(Preempted(step=session.reached, reason=session.stop.reason), "STOPPED")
        raise
    except BaseException as error:
        session.fail(peers.cause_of(error) or f"{type(error).__name__}: {error}")
        raise
    session.end(Finished(step=session.reached), "FINISHED")
