"""The only reader of events.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pipeline.run import journal
from pipeline.run.events.event import E, Event, parse
from pipeline.run.events.launching import Cancelled, GaveUp, Repeated, Submitted
from pipeline.run.events.training import Failed, Finished, Preempted


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
        """Returns what ended a start or a job since the submission; a repetition revokes the ends before it."""
        return list(self.since_submission().of(GaveUp, Cancelled, Failed, Preempted, Repeated, Finished))

    def end(self) -> Event | None:
        """Returns the end that counts: a cancelled training still saves, and afterwards records that it was stopped."""
        ends = self.ends()
        cancelled = None if any(isinstance(end, Finished) for end in ends) else EventLog(ends).last(Cancelled)
        return cancelled or (ends[-1] if ends else None)
