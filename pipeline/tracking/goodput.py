"""Splits the wall time of a run since its submission into parts, from events.jsonl alone.

Every second belongs to exactly one part:

queue       waiting for the scheduler, from `submitted`, `requeued` or the end of a prepare stage to the next process
startup     preparing data in a job of its own, and from the start of a process, or from `restarted`, to its first step
training    steps done for the first time, including validation
checkpoint  the loop waited for a checkpoint (`stall_s` of `checkpointed` and of the last event)
repeated    steps repeated after a kill or a rollback, until `caught_up`
idle        nothing ran and nothing was queued, or nothing was heard for longer than the pace of the run explains
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal

from pipeline.run import journal
from pipeline.run.events import (
    Accounted,
    Cancelled,
    CaughtUp,
    Event,
    EventLog,
    Failed,
    Finished,
    GaveUp,
    NodeLost,
    Preempted,
    PrepareBegan,
    PrepareEnded,
    Ready,
    Repeated,
    Repeating,
    Restarted,
    StartBegan,
    Submitted,
)  # fmt: skip
from pipeline.run.folder import Run
from pipeline.text_format import duration

# Lines are about 400 bytes, more with many sources.
_TAIL_BYTES = 1 << 16
_RECENT_LINES = 20
_FEW_STEPS = 3
# A launcher or the prepare stage writes these: they do not show that a training process is alive.
OUTSIDE = (Submitted, Repeated, NodeLost, Cancelled, GaveUp, PrepareBegan, PrepareEnded)

Part = Literal["queue", "startup", "training", "checkpoint", "repeated", "idle"]


@dataclass(frozen=True)
class Goodput:
    """Seconds of each part; they add up to `wall_s`."""

    queue_s: float = 0.0
    startup_s: float = 0.0
    training_s: float = 0.0
    checkpoint_s: float = 0.0
    repeated_s: float = 0.0
    idle_s: float = 0.0

    @property
    def wall_s(self) -> float:
        """All seconds since submission."""
        return sum(self.parts().values())

    @property
    def fraction(self) -> float:
        """The share of the wall time that advanced training; 0 where no time has passed."""
        return self.training_s / self.wall_s if self.wall_s > 0 else 0.0

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part by its name."""
        return {f.name.removesuffix("_s"): getattr(self, f.name) for f in fields(self)}

    def metrics(self) -> dict[str, float]:
        """Returns the parts as MLflow metrics; its page sorts by name, so `wall/` keeps the losses at the top."""
        seconds = {f"wall/{name}_s": value for name, value in self.parts().items()}
        return {"wall/goodput": self.fraction, "wall/total_s": self.wall_s, **seconds}

    def summary(self) -> str:
        """Returns one line for a reader: `60.3% of 2:55 (queue 1:00, startup 0:15, training 1:37)`."""
        shares = ", ".join(f"{name} {duration(value)}" for name, value in self.parts().items() if value >= 1)
        return f"{self.fraction:.1%} of {duration(self.wall_s)}" + (f" ({shares})" if shares else "")


def goodput(run: Run, events: EventLog, now: float | None = None, queued: bool = False) -> Goodput | None:
    """Splits the time of a run; returns None where nothing has happened yet.

    Args:
        run: The run.
        events: Its events.
        now: Unix seconds up to which a training or queued run is counted; None for its last sign of life (its
            last event or the last line of metrics.jsonl).
        queued: Whether its job waits in the queue now; the run folder does not tell where a node was lost.
    """
    last = journal.last_step(run.metrics_file)
    last_line = float(last["time"]) if last else None
    silence_s = None if now is None else longest_silence_s(run, events)
    return split(events, last_line, now, queued=queued, silence_s=silence_s)


def longest_silence_s(run: Run, events: EventLog) -> float | None:
    """Returns for how many seconds after its last line a process may be silent and train; None before it has a pace.

    That is the longest time between two of its recent lines, and three steps more.
    """
    start = max(0, journal.size(run.metrics_file) - _TAIL_BYTES)
    lines = [line.record for line in journal.read_steps(run.metrics_file, start)][-_RECENT_LINES:]
    began = [event.time for event in events.of(StartBegan)]
    pace = max((float(line.get("time/step_s", 0.0)) for line in lines), default=0.0)
    times = [float(line["time"]) for line in lines]
    gaps = [b - a for a, b in itertools.pairwise(times) if not any(a < moment <= b for moment in began)]
    return max(gaps) + _FEW_STEPS * pace if gaps else None


def split(
    events: EventLog,
    last_line: float | None = None,
    now: float | None = None,
    *,
    queued: bool = False,
    silence_s: float | None = None,
) -> Goodput | None:
    """Splits the time like `goodput`.

    Args:
        events: The events of the run.
        last_line: The time of the last line of metrics.jsonl.
        now: As for `goodput`.
        queued: As for `goodput`.
        silence_s: Seconds after its last sign of life for which a process still counts as alive; None for any time.
    """
    starts = _starts(events, last_line, now, silence_s)
    waits = list(_waits(events))
    if not starts and not waits:
        return None
    totals: dict[Part, float] = dict.fromkeys(("queue", "startup", "training", "checkpoint", "repeated", "idle"), 0.0)
    at = min([*(w.at for w in waits), *(a.began for a in starts[:1])])
    earlier: _Start | None = None
    for start in starts:
        since = at if earlier is None else earlier.began
        before = [w for w in waits if since <= w.at <= start.began]
        if start.requeued and not any(w.part in ("queue", "startup") for w in before):
            before.append(_Wait(at, "queue"))  # Slurm requeued the job by itself
        _account_of_wait(before, at, start.began, totals)
        at = _account(start, max(start.began, at), totals)
        earlier = start
    rest = [w for w in waits if earlier is None or w.at > earlier.began]
    if rest:
        waiting = now is not None and rest[-1].part != "idle"
        _account_of_wait(rest, at, max(at, rest[-1].at, now or 0.0 if waiting else 0.0), totals)
    elif now is not None and isinstance(events.last(StartBegan, Finished), StartBegan):
        _account_of_wait([_Wait(at, "queue" if queued else "idle")], at, max(at, now), totals)
    return Goodput(**{f"{part}_s": seconds for part, seconds in totals.items()})


# ---- between two processes -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wait:
    """The moment from which time without a training process belongs to `part`."""

    at: float
    part: Part


def _waits(events: EventLog) -> Iterator[_Wait]:
    preparing: set[str | None] = set()
    queued = finished = False
    for event in events:
        if isinstance(event, StartBegan | Submitted):
            finished = False
        if isinstance(event, StartBegan):
            queued = False
        elif isinstance(event, Finished) or finished:
            finished = True  # a later evaluation does not count as training time
        elif isinstance(event, Restarted):
            yield _Wait(event.time, "startup")
        elif isinstance(event, Submitted | Repeated):
            queued = True
            yield _Wait(event.time, "startup" if preparing else "queue")
        elif isinstance(event, Cancelled | GaveUp):
            queued = False
            yield _Wait(event.time, "idle")
        elif isinstance(event, PrepareBegan):
            preparing.add(event.slice)
            yield _Wait(event.time, "startup")
        elif isinstance(event, PrepareEnded):
            preparing.discard(event.slice)
            if not preparing:
                yield _Wait(event.time, "queue" if queued and event.done else "idle")


def _account_of_wait(waits: list[_Wait], began: float, end: float, totals: dict[Part, float]) -> None:
    part: Part = "idle"
    at = began
    for wait in sorted(waits, key=lambda w: w.at):
        if wait.at > at:
            totals[part] += min(wait.at, end) - at
            at = min(wait.at, end)
        # A second submission changes nothing: the first one is already waiting.
        part = wait.part
    totals[part] += max(0.0, end - at)


# ---- one process -----------------------------------------------------------------------------------


@dataclass
class _Start:
    """One process, from its start to its last sign of life; `gone` is when a launcher reported its end."""

    began: float
    repeats: bool
    requeued: bool
    last_sign: float
    gone: float | None = None
    ready: float | None = None
    end: float | None = None
    stalls: list[tuple[float, float]] = field(default_factory=list)
    repeated: list[list[float | None]] = field(default_factory=list)


def _starts(
    events: EventLog, last_line: float | None, now: float | None, silence_s: float | None = None
) -> list[_Start]:
    starts: list[_Start] = []
    for event in events:
        if isinstance(event, StartBegan):
            if starts and starts[-1].end is None:
                # Killed before it could report: it lived until its last event or its last line.
                starts[-1].end = max(starts[-1].last_sign, event.last_seen or 0.0)
            began = event.time if event.began is None else event.began
            starts.append(_Start(began, event.reached > event.step, event.requeued, event.time))
        elif starts and starts[-1].end is None:
            _note(starts[-1], event)
    if starts and starts[-1].end is None:
        newest = starts[-1]
        newest.last_sign = max(newest.last_sign, last_line or 0.0)
        alive = newest.gone is None or newest.gone < newest.last_sign
        latest = math.inf if silence_s is None else newest.last_sign + silence_s
        newest.end = min(now, latest) if alive and now is not None else newest.last_sign
    return starts


def _note(start: _Start, event: Event) -> None:
    """Records in `start` what an event says about the time of the process."""
    at = event.time
    if isinstance(event, OUTSIDE):
        start.gone = at if isinstance(event, Repeated | NodeLost) else start.gone
        return
    start.last_sign = at
    repeating = bool(start.repeated) and start.repeated[-1][1] is None
    if isinstance(event, Ready) and start.ready is None:
        start.ready = at
        if start.repeats and not repeating:
            start.repeated.append([at, None])
    elif isinstance(event, Repeating) and not repeating:  # a rollback before it has caught up continues the repeat
        start.repeated.append([at, None])
    elif isinstance(event, CaughtUp) and repeating:
        start.repeated[-1][1] = at
    if isinstance(event, Accounted) and event.stall_s:
        start.stalls.append((at, event.stall_s))
    if isinstance(event, Preempted | Finished | Failed):
        start.end = at


def _account(start: _Start, began: float, totals: dict[Part, float]) -> float:
    """Adds the time of one process to the totals; returns when it ended."""
    end = max(began, start.end if start.end is not None else start.last_sign)
    ready = end if start.ready is None else min(max(start.ready, began), end)
    totals["startup"] += ready - began
    repeated = 0.0
    spans: list[tuple[float, float]] = []
    for first, stop in start.repeated:
        lower, upper = max(first or ready, ready), min(end if stop is None else stop, end)
        if upper > lower:
            spans.append((lower, upper))
            repeated += upper - lower
    # A stall during repeated steps counts as repeated.
    stalled = sum(s for at, s in start.stalls if ready <= at <= end and not any(a <= at <= b for a, b in spans))
    stalled = min(stalled, max(0.0, end - ready - repeated))
    totals["repeated"] += repeated
    totals["checkpoint"] += stalled
    totals["training"] += max(0.0, end - ready - repeated - stalled)
    return end
