"""Opens a session on all ranks and closes it whatever happens."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch

from pipeline import tracking
from pipeline.allocator import keep_freed_memory
from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.sections import Config
from pipeline.data.dataset import TokenDataset, open_splits, refuse_other_tokenizer
from pipeline.data.fingerprint import refuse_other_settings
from pipeline.data.layout import TOKENIZER
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.packing import make_packing
from pipeline.data.order.source_counts import SourceCounts
from pipeline.data.order.validation import validation_windows
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import NothingToDo, PipelineError, StopRequested, in_words
from pipeline.files import sha256_file
from pipeline.optim.schedule import first_other_rate, learning_rates
from pipeline.run.events import CheckpointRejected, EventLog, Finished, Network, Preempted, Resumed, StartBegan, Started
from pipeline.run.folder import Run, create_run, run_for
from pipeline.run.provenance import collect_provenance, current_image, refuse_other_image
from pipeline.run.world import World, world_from_environment
from pipeline.train.clock import StepClock
from pipeline.train.compile_cache import keep_compiled
from pipeline.train.engine.engine import Engine
from pipeline.train.evaluate import Validation
from pipeline.train.guard import Guard
from pipeline.train.origin.origin import Origin, found_origin
from pipeline.train.origin.parent import checkpoints_of
from pipeline.train.profile.on_request import ProfileOnRequest
from pipeline.train.progress import Progress, opening
from pipeline.train.ranks import group
from pipeline.train.ranks.activity import Activity, Roster
from pipeline.train.ranks.device import pick_device
from pipeline.train.ranks.network import sentence
from pipeline.train.ranks.peers import Peers, watched
from pipeline.train.ranks.preflight import preflight
from pipeline.train.ranks.stop import StopRequest
from pipeline.train.recover import Recovery, fill, find_checkpoint
from pipeline.train.session import Session

# How often rank 0 looks whether another start has taken over the run, besides each save and each log line.
OWNER_S = 10.0
# How often rank 0 looks for a request for a profile.
LOOK_S = 1.0

# A thousand million documents take half an hour on one core.
_PACK_TIMEOUT = timedelta(hours=2)


@contextlib.contextmanager
def open_session(
    config: Config, allow_image_change: bool = False, stop: StopRequest | None = None
) -> Iterator[Session]:
    """Yields a session ready for the next step: ranks joined, data open, the newest whole checkpoint loaded."""
    world = world_from_environment()
    device = pick_device(config, world)
    if device.type == "cpu":
        # Activations of the same sizes come and go in every micro-batch; mapping them again is 1 to 5% of a step.
        keep_freed_memory(largest=(1 << 31) - 1, most=-1)
    timeout = group.save_timeout(config.checkpoint)
    file = run_for(config).meeting_file(world.meeting)
    activity = Activity(device)
    with (
        stop or StopRequest() as stop,
        group.process_group(world, device, timeout, file, lambda: stop.reason) as store,
        watched(world, store, activity) as peers,
    ):
        session = _start(config, world, device, stop, peers.roster, activity, allow_image_change)
        peers.at_exit = session.fail
        if world.is_first:
            peers.watch(session.saver.superseded, OWNER_S)
            peers.repeat(session.profile.look, LOOK_S)
            peers.watch_for_hangs(session.run, session.tracker.event, session.progress.message, session.step)
        with _ended(session, peers), session.progress, session.profile.answered():
            session.clock = StepClock()  # start-up is not part of the first step
            yield session


def _start(
    config: Config,
    world: World,
    device: torch.device,
    stop: StopRequest,
    roster: Roster,
    activity: Activity,
    allow_image_change: bool,
) -> Session:
    data, held_out = _open_data(config)
    train, context_length = config.train, config.model.context_length
    windows = validation_windows(held_out, context_length, config.model.document_mask)
    count, chunk = train.num_val_batches * train.batch_size, train.micro_batch_size
    validation = Validation(windows, count, chunk, world, device)
    if config.data.packing == "best_fit":
        verify = config.data.verify
        group.on_first(lambda: make_packing(data.path, context_length + 1, verify=verify), world, _PACK_TIMEOUT)
    reader = BatchReader(
        data,
        config.data,
        seed=train.seed,
        context_length=context_length,
        batch_size=train.batch_size,
        document_starts=config.model.document_mask,
    )
    begun = group.broadcast(bool(published(run_for(config).checkpoints)), world)
    with contextlib.nullcontext() if begun else found_origin(config, data.manifest, world) as origin:
        run = _shared_run(config, world, allow_image_change)
    if run.tokenizer_file.exists():
        refuse_other_tokenizer(data.path, data.manifest, sha256_file(run.tokenizer_file))
    network = preflight(config, world, device, run, data.manifest.digest)
    group.bind_device(device)
    torch.manual_seed(train.seed)
    engine = Engine(config, world, device, activity)
    # Before it is decided where to resume: what an older start published after that would be trained once more.
    saver = _take_over(config, run, world, lambda saved: session.report_save(saved))
    recovery = find_checkpoint(run.checkpoints, world)
    _refuse_finished(run, recovery, config, world)
    if begun and recovery.checkpoint is None:  # every checkpoint was damaged
        with found_origin(config, data.manifest, world) as origin:
            pass
    state = fill(engine, recovery, origin, config, data.manifest.digest)
    step = state.get("step", 0)
    saver.reserve(engine.fragments())
    group.set_timeout(group.save_timeout(config.checkpoint))
    tracker = _start_tracking(config, run, world, data, state, saver)
    lines = opening(config, world, device, data.manifest.splits["train"].tokens, run.path)
    progress = Progress(config.name, step, train.max_iters, enabled=world.is_first, opening=lines)
    session = Session(
        config=config,
        world=world,
        run=run,
        reader=reader,
        validation=validation,
        engine=engine,
        saver=saver,
        stop=stop,
        activity=activity,
        roster=roster,
        profile=ProfileOnRequest(run, world, device, group.store(), activity, tracker.event),
        tracker=tracker,
        progress=progress,
        data_digest=data.manifest.digest,
        tokenizer_digest=data.manifest.tokenizer_digest,
        pinned_in=checkpoints_of(config.init),
        guard=Guard(config.guard, state.get("guard")),
        source_counts=SourceCounts(reader, state.get("source_tokens")),
        step=step,
        tokens_seen=state.get("tokens_seen", 0),
        initialization=state["initialization"],
        init=state.get("init"),
    )
    _announce(session, recovery, origin, network)
    unused = config.model.vocab_size - data.manifest.vocab_size
    if unused > 0:
        progress.message(f"model.vocab_size is {unused} more than the tokenizer's: these tokens occur in no text")
    return session


def _refuse_finished(run: Run, recovery: Recovery, config: Config, world: World) -> None:
    """Ends a start of a run that has finished, before anything of it is recorded.

    Raises:
        NothingToDo: The run has done all its steps and said so, and its last checkpoint is whole.
    """
    step = 0 if recovery.checkpoint is None else step_of(recovery.checkpoint) or 0
    if recovery.rejected or step < config.train.max_iters:
        return
    ended = world.is_first and EventLog.load(run.events_file).last(StartBegan, Finished)
    if group.broadcast(isinstance(ended, Finished), world):
        group.barrier(world)  # rank 0 takes the store, from which its peers read, with it when it leaves
        before, after = (learning_rates(config.optimizer, last) for last in (config.train.max_iters, 2 * step))
        fits = first_other_rate(before, after, step) is None
        how = f"train.max_iters={2 * step}" if fits else f"a new run with init.from={run.path}"
        raise NothingToDo(
            f"{run.path}: finished already, at step {step:,}; {how} would train on, and "
            f"`pipeline sample {run.path}` shows what it has learnt"
        )


def _open_data(config: Config) -> tuple[TokenDataset, TokenDataset]:
    """Returns the training and the validation split."""
    digest = None
    if config.tokenizer.kind == "file" and config.tokenizer.path is not None:
        digest = Tokenizer.load(config.tokenizer.path).digest
    path, vocab_size = config.data.path, config.model.vocab_size
    folder, verify = config.data.token_folder, config.data.verify
    opened = open_splits(path, vocab_size=vocab_size, tokenizer_digest=digest, verify=verify, token_folder=folder)
    refuse_other_settings(path, opened["train"].manifest.settings, config)
    return opened["train"], opened["validation"]


def _shared_run(config: Config, world: World, allow_image_change: bool) -> Run:
    """Returns the run folder, which the first rank creates."""

    def create() -> None:
        if not allow_image_change:
            refuse_other_image(run_for(config).provenance(), current_image())
        run = create_run(config)
        if config.train.compile:
            keep_compiled(run.compiled)

    group.on_first(create, world)
    run = run_for(config)
    if config.train.compile and not world.is_first:
        keep_compiled(run.compiled)
    return run


def _take_over(config: Config, run: Run, world: World, report: Callable[[Saved], None]) -> CheckpointSaver:
    """Takes the run over from any older start, which can publish no checkpoint from now on; returns our saver."""
    start_id = group.broadcast(secrets.token_hex(4), world)
    if world.is_first:
        take_over(run.checkpoints, start_id)
    group.barrier(world)
    identity = RankIdentity(world.rank, world.size, config.train.zero_stage, start_id, group.store())
    rollback_steps = config.guard.rollback_skip if config.guard.on_spike == "rollback" else 0
    return CheckpointSaver(
        run.checkpoints, identity, config.checkpoint, report,
        rollback_steps=rollback_steps, interval=config.train.checkpoint_interval,
    )  # fmt: skip


def _start_tracking(
    config: Config, run: Run, world: World, data: TokenDataset, state: dict[str, Any], saver: CheckpointSaver
) -> tracking.Tracker:
    provenance = group.gather(collect_provenance(), world)
    about = {**provenance[0], "hosts": sorted({p["host"] for p in provenance}), "dataset": data.manifest.digest}
    if config.data.phases:
        about["phases"] = [phase.model_dump() for phase in config.data.phases]
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


def _announce(session: Session, recovery: Recovery, origin: Origin | None, network: Network | None) -> None:
    if network is not None:
        session.tracker.event(network)
        session.progress.message(sentence(network))
    for problem in recovery.rejected:
        session.tracker.event(CheckpointRejected(problem=problem))
        session.progress.message(f"a checkpoint was quarantined: {problem}")
    ready = Started if recovery.checkpoint is None else Resumed
    session.tracker.event(ready(step=session.step, world_size=session.world.size))
    if recovery.checkpoint is not None:
        session.progress.message(f"resuming from {recovery.checkpoint}")
        session.release_parent()  # a start that was killed right after its first save has not
    elif origin is not None:
        for line in origin.lines():
            session.progress.message(line)


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
    return in_words(error) if isinstance(error, PipelineError | OSError) else f"{type(error).__name__}: {error}"
