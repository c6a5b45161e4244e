"""Every kind of event with its fields, and the only writer and reader of events.jsonl.

The kinds of launch/attempts.jsonl, which only the launcher reads, are in launch/slurm/job_records.py.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pipeline.run import journal

E = TypeVar("E", bound="Event")
_KINDS: dict[str, type[Event]] = {}
_END_OF_TIME = 1e11  # Unix seconds
_FORM: Any = functools.cache(TypeAdapter)


def _optional() -> Any:
    """A field that is written only where it has a value."""
    return field(default=None, metadata={"optional": True})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened, as a frozen dataclass; every field has a default, so that older events can be read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(allow_inf_nan=False)
    kind: ClassVar[str] = ""
    time: float = 0.0
    """When it was written, in Unix seconds; 0 before that."""

    def __init_subclass__(cls, kind: str = "") -> None:
        dataclass(frozen=True, kw_only=True)(cls)
        cls.kind = kind
        if kind:
            _KINDS[kind] = cls

    def fields(self) -> dict[str, Any]:
        """Returns the fields of this kind of event by name, without its time."""
        found = {f: getattr(self, f.name) for f in fields(self) if f.name != "time"}
        return {f.name: value for f, value in found.items() if value is not None or "optional" not in f.metadata}

    def record(self) -> dict[str, Any]:
        """Returns the line of the file as plain values."""
        return {"time": self.time, "event": self.kind, **self.fields()}


class UnknownEvent(Event):
    """An event of a kind that this version does not write."""

    name: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """Returns everything the line holds besides its time and kind."""
        return dict(self.values)


class Submitted(Event, kind="submitted"):
    """Jobs were given to the scheduler."""

    jobs: list[str] = field(default_factory=list)
    site: str = ""


class Requeued(Event, kind="requeued"):
    """The job is back in the queue."""

    job: str = ""
    reason: str = ""


class NodeLost(Event, kind="node_lost"):
    """Nodes of the job failed."""

    job: str = ""
    nodes: list[str] = field(default_factory=list)


class Cancelled(Event, kind="cancelled"):
    """A user cancelled the job."""

    job: str = ""


class GaveUp(Event, kind="gave_up"):
    """The job will not be started again."""

    job: str = ""
    stage: str = ""
    reason: str = ""


class PrepareBegan(Event, kind="prepare_began"):
    """A prepare job began."""

    slice: str | None = None
    """Which part it prepares, for example `1/8`; None for everything."""
    job: str = ""


class PrepareEnded(Event, kind="prepare_ended"):
    """A prepare job ended."""

    slice: str | None = None
    job: str = ""
    done: bool = False


class StartBegan(Event, kind="attempt"):
    """A training process began."""

    number: int = 0
    step: int = 0
    """Finished steps of the state it continues from."""
    reached: int = 0
    """Finished steps of the furthest start before it; more than `step` means that steps will be repeated."""
    began: float | None = None
    """When the process was created, in Unix seconds: earlier than `time` by the imports."""
    last_seen: float | None = None
    """When the start before it logged its last line, in Unix seconds."""
    host: str = ""
    job: str | None = None
    restart: int = 0
    """How often Slurm had restarted the job that it runs in."""
    requeued: bool = False
    """Whether Slurm restarted the job that it runs in."""


class BadNode(Event, kind="bad_node"):
    """Preflight found nodes on which training must not start."""

    nodes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Ready(Event):
    """Everything is ready for the first step: `started` from fresh weights or `resumed` from a checkpoint."""

    step: int = 0
    world_size: int = 0


class Started(Ready, kind="started"):
    """Training starts from fresh weights."""


class Resumed(Ready, kind="resumed"):
    """Training resumes from a checkpoint."""


class CheckpointRejected(Event, kind="checkpoint_rejected"):
    """A checkpoint was quarantined at start-up."""

    problem: str = ""


class CheckpointFailed(Event, kind="checkpoint_failed"):
    """A checkpoint could not be saved."""

    step: int = 0
    error: str | None = None


class BadBatch(Event):
    """A guard reported the batch of a step."""

    step: int = 0
    loss: str = ""
    norm: str = ""
    batch: int = 0
    """Index of the global batch."""
    path: str | None = None
    """Where the batch was recorded; None if that failed."""
    error: str | None = _optional()


class BadStep(BadBatch, kind="bad_step"):
    """A loss or gradient was not finite; the step was skipped."""


class Spike(BadBatch, kind="spike"):
    """A loss was far above those before it."""


class RolledBack(Event, kind="rollback"):
    """Training rolled back to a checkpoint and skips batches."""

    step: int = 0
    to: int = 0
    skipped: list[int] = field(default_factory=list)


class Repeating(Event, kind="repeating"):
    """Steps up to `reached` are done again from here."""

    step: int = 0
    reached: int = 0


class CaughtUp(Event, kind="caught_up"):
    """From here on steps are done for the first time."""

    step: int = 0


class Accounted(Event):
    """An event that carries the checkpoint stall since the one before it."""

    step: int = 0
    stall_s: float | None = _optional()
    """Seconds for which steps waited for a checkpoint."""


class Checkpointed(Accounted, kind="checkpointed"):
    """A checkpoint was published."""

    path: str | None = _optional()
    digest: str | None = _optional()
    seconds: float | None = _optional()
    """From the beginning of the save until it was durable."""


class Preempted(Accounted, kind="preempted"):
    """The start stopped on request with everything saved."""

    reason: str | None = None


class Finished(Accounted, kind="finished"):
    """The last step is done."""


class Failed(Accounted, kind="failed"):
    """The start ended with an error."""

    error: str = ""


def append(path: Path, event: E) -> E:
    """Appends an event and returns it with its time; several processes (launcher, trainer, user) may write to the file.

    Raises:
        OSError: It cannot be written whole; readers ignore what is there of it.
    """
    written = event if event.time else replace(event, time=round(time.time(), 3))
    journal.append(path, written.record())
    return written


def parse(record: Mapping[str, Any]) -> Event:
    """Returns the event of one line; ignores fields that its kind does not have."""
    values = {name: value for name, value in record.items() if name not in ("time", "event")}
    given = record.get("time")
    at = float(given) if isinstance(given, (int, float)) and 0 <= given < _END_OF_TIME else 0.0
    kind = _KINDS.get(str(record.get("event")))
    if kind is not None:
        with contextlib.suppress(ValidationError):  # others may have written the file, with values of other types
            return _FORM(kind).validate_python({**values, "time": at})
    return UnknownEvent(time=at, name=str(record.get("event", "")), values=values)


class EventLog(tuple[Event, ...]):
    """The events of one file in the order they were written, read once."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file; empty where there is none."""
        return cls(parse(line.record) for line in journal.read(path))

    def of(self, *kinds: type[E]) -> list[E]:
        """Returns the events of these kinds."""
        return [event for event in self if isinstance(event, kinds)]

    def last(self, *kinds: type[E]) -> E | None:
        """Returns the newest event of these kinds."""
        return next((event for event in reversed(self) if isinstance(event, kinds)), None)

    def since(self, moment: float) -> Self:
        """Returns the events written at or after a moment in Unix seconds."""
        return type(self)(event for event in self if event.time >= moment)

    def since_submission(self) -> Self:
        """Returns the newest `submitted` and what came after it; everything for a run that was never submitted."""
        last = max((i for i, event in enumerate(self) if isinstance(event, Submitted)), default=0)
        return type(self)(self[last:])

    def ends(self) -> list[Event]:
        """Returns what ended a start or a job since the submission; a requeue revokes the ends before it."""
        return list(self.since_submission().of(GaveUp, Cancelled, Failed, Preempted, Requeued, Finished))
