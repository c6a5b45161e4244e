"""What the report reads of a run: its curves, restarts, goodput and cost."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.run import journal
from pipeline.run.events import EventLog, Repeating, StartBegan
from pipeline.run.folder import Run
from pipeline.tracking.goodput import goodput
from pipeline.tracking.report.charts import Curve, Series
from pipeline.tracking.usage import usage


def read_series(run: Run, name: str) -> Series:
    """Reads the curves of a run from metrics.jsonl and its restarts from events.jsonl."""
    columns: dict[str, tuple[list[int], list[float]]] = {}
    for line in journal.read_steps(run.metrics_file):
        step = int(line.record["step"])
        for key, value in line.record.items():
            if key not in ("step", "time") and isinstance(value, (int, float)):
                steps, values = columns.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value))
    events = EventLog.load(run.events_file)
    restarts = [event.step for event in events if isinstance(event, StartBegan | Repeating)][1:]
    curves = {key: Curve(steps, values) for key, (steps, values) in columns.items()}
    return Series(name, curves, restarts, goodput(run, events), usage(run, events))


def has_metrics(series: Sequence[Series]) -> bool:
    """Whether any of the runs has logged something."""
    return any(s.curves for s in series)
