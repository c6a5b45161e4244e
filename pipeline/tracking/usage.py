"""What a run cost: GPU-hours and CPU-core-hours of its allocations, failed ones too, and the measured energy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, Charged
from pipeline.run.events import EventLog, StartBegan
from pipeline.run.folder import Run
from pipeline.tracking.energy import gpu_energy
from pipeline.tracking.goodput import OUTSIDE

_J_PER_KWH = 3.6e6
_END_OF_TIME = 1e11  # Unix seconds
# Between what Slurm and the batch script call the beginning: a prolog, and clocks of two machines.
_SLACK_S = 120.0


@dataclass(frozen=True)
class Usage:
    """The cost of a run."""

    allocations: int
    """How many, requeued and failed ones too; 0 for a run without Slurm."""
    gpu_hours: float
    """Allocated GPUs x wall time."""
    cpu_core_hours: float
    """Allocated CPU cores x wall time."""
    gpu_kwh: float | None
    """Energy of the GPUs, integrated from their sampled power; None where it was not measured."""
    metered_gpu_hours: float | None
    """The GPU-hours over which that was measured."""
    node_kwh: float | None
    """Energy of whole nodes by Slurm's accounting; None where Slurm does not measure it."""

    def metrics(self) -> dict[str, float]:
        """Returns what is known as MLflow metrics."""
        names = ("gpu_hours", "cpu_core_hours") if self.allocations else ()
        names = (*names, "gpu_kwh", "node_kwh")
        return {f"usage/{name}": value for name in names if (value := getattr(self, name)) is not None}

    def hours(self) -> str:
        """Returns `12.30 GPU-hours`, or CPU-core-hours for a run without GPUs."""
        return f"{self.gpu_hours:,.2f} GPU-hours" if self.gpu_hours else f"{self.cpu_core_hours:,.2f} CPU-core-hours"

    def energy(self) -> str:
        """Returns whose energy was how much, or `not measured`."""
        parts = []
        if self.gpu_kwh is not None:
            parts.append(f"{self.gpu_kwh:,.3f} kWh by GPUs, over {self.metered_gpu_hours or 0:,.2f} GPU-hours")
        if self.node_kwh is not None:
            parts.append(f"{self.node_kwh:,.3f} kWh by nodes (Slurm)")
        return "; ".join(parts) or "not measured"

    def summary(self) -> str:
        """Returns one line for a reader."""
        count = f"{self.allocations} allocation{'s' if self.allocations != 1 else ''}"
        return f"{self.hours()} in {count}; energy {self.energy()}" if self.allocations else f"energy {self.energy()}"


def usage(run: Run, events: EventLog, now: float | None = None, charged: Iterable[Charged] = ()) -> Usage | None:
    """Adds up the allocations of a run; returns None where neither an allocation nor energy is known.

    Args:
        run: The run.
        events: Its events.
        now: Unix seconds up to which an attempt that has not ended is counted; None for its last sign of life.
        charged: What Slurm's accounting says now; what the launcher recorded of it counts too.
    """
    notes = attempts.every(run)
    rows = {(row.job, row.began): row for row in [*notes.of(Charged), *charged]}
    began = notes.of(AttemptBegan)
    spans = [_Span.of_row(row, [a for a in began if _is_of(a, row)]) for row in rows.values()]
    # Slurm knows better than the attempt itself, which begins after the prolog and may die without a word.
    own = [a for a in began if not any(_is_of(a, row) for row in rows.values())]
    spans += _own_spans(own, notes, list(_signs(run, events)), now)
    metered = gpu_energy(run)
    if not spans and metered is None:
        return None
    joules = [row.energy_j for row in rows.values() if row.energy_j is not None]
    # Records of earlier versions do not number allocations: each of their attempts had one of its own.
    held = {(a.job, a.time if a.allocation is None else a.allocation) for a in own}
    return Usage(
        allocations=len(rows) + len(held),
        gpu_hours=sum(span.seconds * span.gpus for span in spans) / 3600,
        cpu_core_hours=sum(span.seconds * span.cpus for span in spans) / 3600,
        gpu_kwh=None if metered is None else metered[0] / _J_PER_KWH,
        metered_gpu_hours=None if metered is None else metered[1] / 3600,
        node_kwh=sum(joules) / _J_PER_KWH if joules else None,
    )


@dataclass(frozen=True)
class _Span:
    """The time of an allocation, and what it held."""

    seconds: float
    gpus: int
    cpus: int

    @classmethod
    def of_row(cls, row: Charged, of: list[AttemptBegan]) -> _Span:
        # Slurm counts GPUs only where the cluster's AccountingStorageTRES names them.
        gpus = row.gpus or max((a.gpus for a in of), default=0)
        return cls(min(max(row.seconds, 0.0), _END_OF_TIME), gpus, row.cpus)


def _is_of(attempt: AttemptBegan, row: Charged) -> bool:
    return attempt.job == row.job and row.began - _SLACK_S <= attempt.time <= row.began + row.seconds + _SLACK_S


def _own_spans(began: list[AttemptBegan], notes: EventLog, signs: list[float], now: float | None) -> Iterator[_Span]:
    newest = next((attempt.stage for attempt in reversed(began) if not attempt.beside), "")
    for attempt in began:
        after = [a.time for a in notes.of(AttemptBegan) if a.job == attempt.job and a.time > attempt.time]
        next_one = min(after, default=_END_OF_TIME)
        ends = [
            note.time
            for note in notes.of(AttemptEnded)
            if (note.job, note.attempt) == (attempt.job, attempt.attempt) and attempt.time <= note.time <= next_one
        ]
        if ends:
            end = ends[0]
        elif now is not None and not after and (attempt.beside or attempt.stage == newest):
            end = max(attempt.time, now)
        else:  # it was killed
            seen = [sign for sign in signs if attempt.time < sign < next_one] if attempt.stage == "train" else []
            end = max(seen, default=attempt.time)
        yield _Span(end - attempt.time, attempt.gpus, attempt.cpus or 0)


def _signs(run: Run, events: EventLog) -> Iterator[float]:
    """Yields the moments at which a training process was alive."""
    for event in events:
        if not isinstance(event, OUTSIDE):
            yield event.time
        if isinstance(event, StartBegan) and event.last_seen is not None:
            yield event.last_seen
    last = journal.last_step(run.metrics_file)
    yield float(last["time"]) if last else -math.inf
