"""The lines of metrics.jsonl, as other trackers take them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.run import journal
from pipeline.run.folder import Run


@dataclass(frozen=True)
class Row:
    """The metrics of one line."""

    step: int
    time: float
    """Unix seconds."""
    values: dict[str, float]


def rows(run: Run) -> Iterator[Row]:
    """Yields the lines that hold metrics, in their order."""
    for line in journal.read_steps(run.metrics_file):
        record: dict[str, Any] = dict(line.record)
        yield Row(record.pop("step"), float(record.pop("time")), {key: float(value) for key, value in record.items()})
