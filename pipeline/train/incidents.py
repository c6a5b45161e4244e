"""Acting on the numbers of finished steps: bad steps and spikes are recorded, a jump may roll the run back.

The numbers of a step are read only when the next one has been launched, so that the device never waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.read import CheckpointReader
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.run.events import BadBatch, BadStep, RolledBack, Spike
from pipeline.train.clock import every
from pipeline.train.engine.step_numbers import Numbers, PendingNumbers
from pipeline.train.guard import Guard, data_index, record_batch
from pipeline.train.ranks import group
from pipeline.train.recover import quarantine
from pipeline.train.session import Session


@dataclass(frozen=True)
class Rollback:
    """A way back to before a loss that jumped."""

    step: int
    """The step whose loss jumped."""
    checkpoint: Path
    """The folder to resume from."""


@dataclass(frozen=True)
class Verdict:
    """What the numbers just read demand, the same on all ranks."""

    rollback: Rollback | None = None
    """How far training must roll back; None if it need not."""
    stop: bool = False
    """Whether any rank was asked to stop."""


def inspect(session: Session, step: int, pending: PendingNumbers) -> Verdict:
    """Reads the previous step's numbers, and this step's when a log line, validation, save or stop is due.

    Args:
        session: The session that trains.
        step: Finished steps.
        pending: The numbers of the last one.

    Raises:
        PipelineError: Too many steps in a row were not finite.
    """
    train, unread = session.config.train, session.unread
    intervals = (train.log_interval, train.val_interval, train.checkpoint_interval)
    due = step == train.max_iters or any(every(step, interval) for interval in intervals)
    unread.append((step, pending))
    stop = False
    while len(unread) > 1 or (unread and (due or stop)):
        finished, numbers = unread[0][0], unread.popleft()[1].read()
        stop = stop or numbers.stop
        session.profile.agree(numbers.profile)
        rollback = _judge(session, finished, numbers)
        if rollback is not None:
            unread.clear()  # the rollback undoes the later steps
            return Verdict(rollback)
    return Verdict(stop=stop)


def roll_back(session: Session, rollback: Rollback) -> int:
    """Returns to the checkpoint before a jump, skipping its batches from now on; the step to continue from."""
    reader = CheckpointReader(rollback.checkpoint)
    session.engine.load(reader)
    state = reader.manifest.state
    reader.close()
    suspects = range(rollback.step - session.config.guard.rollback_skip, rollback.step)
    skipped = session.guard.skipped
    session.guard = Guard(session.config.guard, state["guard"])
    session.guard.skip_batches([*skipped, *(data_index(s, skipped) for s in suspects)])
    session.source_counts.restore(state.get("source_tokens"))
    if session.world.is_first:
        for newer in published(session.run.checkpoints):
            if newer > rollback.checkpoint:
                quarantine(newer)
    group.barrier(session.world)
    session.step, session.tokens_seen = reader.manifest.step, state["tokens_seen"]
    session.tracker.event(RolledBack(step=rollback.step, to=session.step, skipped=list(session.guard.skipped)))
    session.tracker.rewind(session.step)
    if session.evaluation is not None and session.evaluation.step > session.step:
        session.evaluation = None  # of weights that are gone: the same step will come again with others
    session.clock.skip()
    return session.step


def _judge(session: Session, step: int, numbers: Numbers) -> Rollback | None:
    guard, settings = session.guard, session.config.guard
    if guard.is_bad(numbers.loss, numbers.norm):
        _report(session, BadStep, step, "loss or gradient is not finite; the step is skipped", numbers)
        guard.check_patience(session.run.bad_batches)
        return None
    if not guard.is_spike(numbers.loss):
        return None
    checkpoint = _checkpoint_before(session, step) if settings.on_spike == "rollback" else None
    _report(session, Spike, step, "the loss jumped" + ("; rolling back" if checkpoint else ""), numbers)
    if checkpoint is None:
        guard.accept(numbers.loss)
        return None
    return Rollback(step, checkpoint)


def _checkpoint_before(session: Session, step: int) -> Path | None:
    """Returns the newest checkpoint that no batch skipped by a rollback has touched; None if there is none."""
    # A save in progress may publish this very checkpoint and delete an older one. Until it ends, what the folder
    # shows depends on the speed of the disk, and what was found there may be gone when it is loaded.
    session.saver.wait()
    newest = step - session.config.guard.rollback_skip
    found = published(session.run.checkpoints) if session.world.is_first else []
    fit = next((str(folder) for folder in found if (step_of(folder) or 0) <= newest), None)
    agreed = group.broadcast(fit, session.world, group.save_timeout(session.config.checkpoint))
    return None if agreed is None else Path(agreed)


def _report(session: Session, kind: type[BadBatch], step: int, what: str, numbers: Numbers) -> None:
    """Records the batch of a step that caused trouble; a full disk must not end the run."""
    if not session.world.is_first:
        return
    run, config = session.run, session.config
    index = data_index(step - 1, session.guard.skipped)
    event = kind(step=step, loss=str(numbers.loss), norm=str(numbers.norm), batch=index)
    try:
        path = record_batch(
            run.bad_batches,
            f"{kind.kind}_{step:08d}",
            session.reader,
            index,
            config.train.batch_size,
            Tokenizer.load(run.tokenizer_file, config.tokenizer.end_of_text),
            step=step,
            loss=numbers.loss,
            norm=numbers.norm,
        )
    except OSError as error:
        where = f"batch {index} could not be written to {run.bad_batches}: {error.strerror or error}"
        event = replace(event, error=where)
    else:
        where = f"the batch is in {path}"
        event = replace(event, path=str(path))
    session.tracker.event(event)
    session.progress.message(f"step {step}: {what} (loss {numbers.loss:.4g}, norm {numbers.norm:.4g}); {where}")
