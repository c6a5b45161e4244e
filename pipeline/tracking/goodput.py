"""Goodput: where the wall time of a run went since it was submitted, from events.jsonl alone.

Every second belongs to exactly one part:

queue       waiting for the scheduler: from `submitted` or `requeued` until the process began
startup     from the beginning of the process to the first step (`started`, `resumed`)
training    steps done for the first time, validation included
checkpoint  the loop stood still for a checkpoint (`stall_s` of `checkpointed` and of the last event)
repeated    steps done again after a kill or a rollback, until `caught_up`
idle        nothing ran and nothing was queued
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pipeline.run import Run
from pipeline.tracking import journal

_ENDS = ("preempted", "finished", "failed", "stopped")
_QUEUED = ("submitted", "requeued")


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
        """Everything since submission."""
        return sum(self.parts().values())

    @property
    def fraction(self) -> float:
        """The part of the wall time in which training got further; 0 where no time has passed."""
        return self.training_s / self.wall_s if self.wall_s > 0 else 0.0

    def parts(self) -> dict[str, float]:
        """Seconds by the name of the part."""
        return {f.name.removesuffix("_s"): getattr(self, f.name) for f in fields(self)}

    def metrics(self) -> dict[str, float]:
        """The same as MLflow metrics (whose page sorts by name: losses stay at its top)."""
        seconds = {f"wall/{name}_s": value for name, value in self.parts().items()}
        return {"wall/goodput": self.fraction, "wall/total_s": self.wall_s, **seconds}

    def summary(self) -> str:
        """One line for a person."""
        shares = ", ".join(f"{name} {value:.0f} s" for name, value in self.parts().items() if value >= 0.5)
        return f"{100 * self.fraction:.1f}% of {self.wall_s:.0f} s" + (f" ({shares})" if shares else "")


@dataclass
class _Attempt:
    """One process, from its beginning to its last sign of life."""

    began: float
    repeats: bool
    ready: float | None = None
    end: float | None = None
    last_sign: float = 0.0
    stalls: list[tuple[float, float]] | None = None
    repeated: list[list[float | None]] | None = None


def goodput(run: Run, now: float | None = None) -> Goodput | None:
    """Splits the time of a run; None where no process has begun yet.

    Args:
        run: The run.
        now: End of the account for a run whose last process has not ended, Unix seconds; without it, its
            last sign of life (the last event or the last line of metrics.jsonl).
    """
    events = [line.record for line in journal.read(run.events_file) if "time" in line.record]
    last = journal.last(run.metrics_file)
    return split(events, last_line=float(last["time"]) if last else None, now=now)


def split(events: list[dict[str, Any]], last_line: float | None = None, now: float | None = None) -> Goodput | None:
    """Like `goodput`, from parsed events in the order they were written."""
    attempts, queued = _attempts(events)
    if not attempts:
        return None
    newest = attempts[-1]
    if newest.end is None:
        newest.last_sign = max(newest.last_sign, last_line or 0.0)
        newest.end = now if now is not None else newest.last_sign
    totals = dict.fromkeys((f.name for f in fields(Goodput)), 0.0)
    before = min([t for t in queued if t <= attempts[0].began], default=attempts[0].began)
    for attempt in attempts:
        waiting = max(0.0, attempt.began - before)
        since = max((t for t in queued if before - 1e-9 <= t <= attempt.began), default=None)
        queue = 0.0 if since is None else attempt.began - since
        totals["queue_s"] += queue
        totals["idle_s"] += max(0.0, waiting - queue)
        before = _account(attempt, max(attempt.began, before), totals)
    return Goodput(**totals)


def _account(attempt: _Attempt, began: float, totals: dict[str, float]) -> float:
    """Adds one process's time to the totals; returns when it ended."""
    end = max(began, attempt.end if attempt.end is not None else attempt.last_sign)
    ready = end if attempt.ready is None else min(max(attempt.ready, began), end)
    totals["startup_s"] += ready - began
    repeated = 0.0
    spans: list[tuple[float, float]] = []
    for first, stop in attempt.repeated or []:
        lower, upper = max(first or ready, ready), min(end if stop is None else stop, end)
        if upper > lower:
            spans.append((lower, upper))
            repeated += upper - lower
    # A stall among repeated steps is repeated time.
    stalled = sum(s for at, s in attempt.stalls or [] if ready <= at <= end and not any(a <= at <= b for a, b in spans))
    stalled = min(stalled, max(0.0, end - ready - repeated))
    totals["repeated_s"] += repeated
    totals["checkpoint_s"] += stalled
    totals["training_s"] += max(0.0, end - ready - repeated - stalled)
    return end


def _attempts(events: list[dict[str, Any]]) -> tuple[list[_Attempt], list[float]]:
    attempts: list[_Attempt] = []
    queued: list[float] = []
    for event in events:
        kind, at = event.get("event"), float(event["time"])
        if kind in _QUEUED:
            queued.append(at)
        if kind == "attempt":
            if attempts and attempts[-1].end is None:
                # Killed without a word: it lived until its last event or its last line.
                attempts[-1].end = max(attempts[-1].last_sign, float(event.get("last_seen") or 0.0))
            if attempts and event.get("requeued"):
                queued.append(attempts[-1].end or at)  # Slurm put the job back into the queue by itself
            repeats = int(event.get("reached", 0)) > int(event.get("step", 0))
            attempts.append(_Attempt(float(event.get("began", at)), repeats, last_sign=at, stalls=[], repeated=[]))
            continue
        if not attempts or (attempts[-1].end is not None and kind in _QUEUED):
            continue
        current = attempts[-1]
        current.last_sign = at if kind not in _QUEUED else current.last_sign
        assert current.stalls is not None and current.repeated is not None
        if kind in ("started", "resumed") and current.ready is None:
            current.ready = at
            if current.repeats:
                current.repeated.append([at, None])
        elif kind == "repeating":
            current.repeated.append([at, None])
        elif kind == "caught_up":
            for span in current.repeated:
                span[1] = at if span[1] is None else span[1]
        if event.get("stall_s"):
            current.stalls.append((at, float(event["stall_s"])))
        if kind in _ENDS:
            current.end = at
    return attempts, queued
