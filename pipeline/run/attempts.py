"""What happened to the attempts of a run's jobs: every kind of line of launch/attempts.jsonl, its writer and reader.

The launcher appends to it; the accounts of a run (`tracking/usage.py`) read it too.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal, TypeVar

from pipeline.run import events
from pipeline.run.events import Event, EventLog
from pipeline.run.folder import Run

Stage = Literal["prepare", "train", "evaluate"]
STAGES: tuple[Stage, ...] = ("prepare", "train", "evaluate")
E = TypeVar("E", bound=Event)


class AttemptEvent(Event):
    """Something that happened to an attempt: one start of the tasks of a job."""

    stage: str = ""
    job: str = ""
    attempt: int = 0


class AttemptBegan(AttemptEvent, kind="began"):
    """The batch script of an attempt began."""

    nodes: str = ""
    """Slurm's short form of the node list."""
    gpus: int = 0
    """GPUs that the job requested, on all nodes together."""
    cpus: int | None = None
    """CPU cores that it requested, on all nodes together; None in records of earlier versions."""
    allocation: int | None = None
    """How often the job had been through the queue before; attempts of the same number shared an allocation."""
    beside: bool = False
    """Whether its job works beside the chain of the run."""
    log_bytes: int = 0
    """Size of Slurm's log of the job: all attempts write into one file."""


class AttemptEnded(AttemptEvent, kind="ended"):
    """The tasks of an attempt ended."""

    outcome: str = ""
    reason: str = ""
    code: int = 0
    """What srun returned."""
    progress: int = 0
    """The step of the newest checkpoint, or the number of finished slices."""
    lost: list[str] = field(default_factory=list)
    counts: bool = False
    """Whether it counts against `requeue.same_step_failures`."""


class RankEnded(AttemptEvent):
    """A rank ended without having finished."""

    rank: int = 0
    host: str = ""
    status: int = 0


class RankFailed(RankEnded, kind="rank_failed"):
    """A rank failed without having been asked to stop."""

    said: str = ""
    """The last line that it printed, or why it could not start."""


class RankStopped(RankEnded, kind="rank_stopped"):
    """A rank stopped on request."""


class Charged(Event, kind="charged"):
    """What Slurm's accounting says about one allocation of a job of the run."""

    job: str = ""
    began: float = 0.0
    """In Unix seconds."""
    seconds: float = 0.0
    """Wall time, up to now for one that has not ended."""
    gpus: int = 0
    cpus: int = 0
    energy_j: float | None = None
    """Energy of its nodes in joules; None where Slurm does not measure it."""


class Notified(AttemptEvent, kind="notified"):
    """A message is sent to the person who submitted the job."""

    once: str = ""
    """Names what it is about: another message of this run with the same words is not sent."""


def note(run: Run, event: E) -> E:
    """Appends what happened to an attempt, or what it was charged, and returns it with its time."""
    run.attempts_file.parent.mkdir(parents=True, exist_ok=True)
    return events.append(run.attempts_file, event)


def every(run: Run) -> EventLog:
    """Returns what happened to all attempts of a run, in order."""
    return EventLog.load(run.attempts_file)


def notes(run: Run, stage: Stage) -> EventLog:
    """Returns what happened to the attempts of a stage, in order."""
    return EventLog(n for n in every(run).of(AttemptEvent) if n.stage == stage)
