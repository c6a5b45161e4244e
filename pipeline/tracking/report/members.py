"""Runs that belong together, as far as each can be read: their values, state and figures, and a table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import PipelineError
from pipeline.run.events import Cancelled, EventLog, Failed, Finished, GaveUp, Preempted, StartBegan
from pipeline.run.folder import Run
from pipeline.run.related import SweepRun
from pipeline.text_format import printable, short
from pipeline.tracking.report.charts import Series
from pipeline.tracking.report.page import Section
from pipeline.tracking.report.series import read_series
from pipeline.tracking.upload.sync import is_alive

LOSS = "val/loss"


@dataclass(frozen=True)
class Member:
    """One run of a sweep, as far as it can be read."""

    name: str
    values: dict[str, str]
    """Its swept values, by dotted key."""
    state: str
    series: Series | None = None
    """None where its folder is missing or damaged."""

    @property
    def loss(self) -> float:
        """The last validation loss; infinite where there is none, or it is not finite."""
        curve = self.series.curves.get(LOSS) if self.series else None
        return curve.values[-1] if curve and math.isfinite(curve.values[-1]) else math.inf

    def last(self, key: str) -> float | None:
        """Returns the last value of a metric."""
        curve = self.series.curves.get(key) if self.series else None
        return curve.values[-1] if curve else None


def read_member(one: SweepRun) -> Member:
    """Returns what can be read of a run."""
    try:
        if not one.run.path.is_dir():
            return Member(one.run.name, one.values, "its folder is gone")
        state = _state(one.run)
        return Member(one.run.name, one.values, state, read_series(one.run, one.run.name))
    except PipelineError as error:
        return Member(one.run.name, one.values, f"damaged: {error}")


def _state(run: Run) -> str:
    """Returns the state of a run as its folder tells it; `pipeline status` asks Slurm too."""
    events = EventLog.load(run.events_file)
    if is_alive(run, events):
        return "running"
    match events.end():
        case Finished():
            return "finished"
        case Cancelled():
            return "cancelled"
        case GaveUp(reason=reason) | Failed(error=reason):
            return f"failed: {reason}"
        case Preempted():
            return "stopped"
    return "stopped" if events.of(StartBegan) else "not started"


def keys_of(members: Sequence[Member]) -> list[str]:
    """Returns the swept keys of all runs, in order."""
    return list(dict.fromkeys(key for one in members for key in one.values))


def short_key(key: str, keys: Sequence[str]) -> str:
    """Returns the last part of a key, or the whole where another key has the same."""
    last = key.rpartition(".")[2]
    return last if [k.rpartition(".")[2] for k in keys].count(last) == 1 else key


def runs_table(members: Sequence[Member], title: str) -> Section:
    """Returns a table of runs by their final validation loss."""
    keys = keys_of(members)
    rows = []
    for one in sorted(members, key=lambda member: member.loss):
        tokens, step = one.last("train/tokens_seen"), 0
        if one.series is not None:
            step = max((curve.steps[-1] for curve in one.series.curves.values()), default=0)
        loss = f"{one.loss:.4f}" if math.isfinite(one.loss) else ""
        values = [printable(one.values.get(key, "")) for key in keys]
        rows.append([one.name, *values, loss, f"{step:,}", short(tokens) if tokens else "", printable(one.state)])
    head = ["run", *(short_key(key, keys) for key in keys), "validation loss", "step", "tokens", "state"]
    return Section(title, wide=True, head=head, rows=rows)
