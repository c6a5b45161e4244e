"""What the person who submitted a job is told about it: each thing once and within seconds.

Nothing here may change how a job ends: a problem is one line in the job's log.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time

from pipeline.errors import PipelineError
from pipeline.launch.job.spec import Attempt
from pipeline.launch.notify.send import LIMIT_S, Message, send
from pipeline.launch.notify.settings import Occasion, load
from pipeline.launch.slurm import client as slurm
from pipeline.run import attempts, journal
from pipeline.run.attempts import Notified
from pipeline.run.events import Spike, parse
from pipeline.run.world import DEADLINE_VARIABLE
from pipeline.text_format import echo

_LOSSES = {"train/loss": "loss", "val/loss": "validation loss"}
# A job must have ended by itself before its time limit.
_BEFORE_DEADLINE_S = 5.0
# Of an attempt: a run that has gone wrong spikes at every step.
_MOST_SPIKES = 3


def tell_finished(attempt: Attempt) -> None:
    """Tells that training has finished."""
    last: dict[str, float] = {}
    with contextlib.suppress(OSError, PipelineError):
        last = journal.last_step(attempt.run.metrics_file) or {}
    losses = [f", {name} {last[key]:.4f}" for key, name in _LOSSES.items() if key in last]
    subject = f"finished at step {last.get('step', 0):,}{''.join(losses)}"
    _tell(attempt, "finished", subject, _of_job(attempt, "finished"))


def tell_failed(attempt: Attempt, reason: str, number: int | None = None) -> None:
    """Tells that an attempt failed and that the job continues; of the tasks of an array, only the first one tells.

    Args:
        attempt: The attempt that tells.
        reason: Why the other one failed.
        number: The number of the one that failed; None if it is the same.
    """
    failed = attempt.number if number is None else number
    subject = f"attempt {failed} of {attempt.stage} failed and is repeated: {reason}"
    _tell(attempt, "failed", subject, f"{_of_job(attempt, 'failed')} {failed}")


def tell_gave_up(attempt: Attempt, reason: str) -> None:
    """Tells that a job will not be started again; of the tasks of an array, only the first one tells."""
    _tell(attempt, "gave_up", f"gave up in {attempt.stage}: {reason}", _of_job(attempt, "gave_up"))


def tell_spike(attempt: Attempt, event: Spike, is_last: bool) -> None:
    """Tells that the loss was far above those before it; steps that are repeated do not tell again."""
    rest = "; further ones of this attempt are in events.jsonl only" if is_last else ""
    _tell(attempt, "spike", f"the loss jumped to {event.loss} at step {event.step:,}{rest}", f"spike {event.step}")


class SpikesTold:
    """Tells of the first spikes of an attempt, those that are new at each call.

    Args:
        attempt: The attempt.
        seen: Bytes of events.jsonl that are older.
    """

    def __init__(self, attempt: Attempt, seen: int) -> None:
        self._attempt, self._offset, self._told = attempt, seen, 0

    def __call__(self) -> None:
        """Reads the events that have come, and tells.

        Raises:
            PipelineError: The file of the events is damaged.
        """
        if self._told == _MOST_SPIKES:
            return
        for line in journal.read(self._attempt.run.events_file, self._offset):
            self._offset = line.end
            event = parse(line.record)
            if isinstance(event, Spike) and self._told < _MOST_SPIKES:
                self._told += 1
                tell_spike(self._attempt, event, is_last=self._told == _MOST_SPIKES)


def _of_job(attempt: Attempt, occasion: Occasion) -> str:
    return f"{occasion} {slurm.base(attempt.job)}"


def _tell(attempt: Attempt, occasion: Occasion, subject: str, once: str) -> None:
    """Sends a message unless one of the same `once` was sent for this run."""
    if attempt.notify is None:
        return
    try:
        settings = load(attempt.notify)
        left = float(os.environ.get(DEADLINE_VARIABLE, math.inf)) - time.time() - _BEFORE_DEADLINE_S
        if occasion not in settings.on or not _is_first(attempt, once):
            return
        if left <= 0:
            raise TimeoutError("the job is at its time limit")
        folder = str(attempt.run.path.absolute())
        where = f"{folder}: job {attempt.job} ({attempt.stage}), attempt {attempt.number}, {attempt.site.name}"
        about = {"event": occasion, "run": folder, "job": attempt.job}
        message = Message(about, f"{attempt.run.name}: {subject}", where)
        problems = send(settings, message, min(LIMIT_S, left))
    except Exception as error:  # nothing about a message may change how a job ends
        problems = ["; ".join(map(str.strip, str(error).splitlines()))]
    for problem in problems:
        echo(f"pipeline: the message that {once!r} happened was not sent: {problem}", sys.stderr)


def _is_first(attempt: Attempt, once: str) -> bool:
    """Records that a message is about to be sent; returns whether nobody has recorded it before."""
    run = attempt.run
    if any(note.once == once for note in attempts.every(run).of(Notified)):
        return False
    try:
        own = attempts.note(run, Notified(**attempt.about(), once=once))
    except OSError:  # a full disk is worth a message, even twice
        return True
    # Of the tasks of an array several may have come as far as this.
    return next((note for note in attempts.every(run).of(Notified) if note.once == once), own) == own
