"""The scores on tasks in the report: a chart per task with the standard error, and a table of the newest step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from pipeline.run.evaluations import TaskEvaluation, TaskScores, evaluations, suffix
from pipeline.run.folder import Run
from pipeline.text_format import printable
from pipeline.tracking.report.charts import colour_of, escaped, styled, to_html
from pipeline.tracking.report.page import Section

_NOTE = "Bars: one standard error. {better}"
_WORDS = {True: "Higher is better.", False: "Lower is better.", None: ""}


@dataclass(frozen=True)
class _Point:
    """The scores of a task or group at a step of a run."""

    run: str
    task: str
    """With what was asked for: `hellaswag_5shot`."""
    step: int
    scores: TaskScores
    named: bool
    """Whether it was asked for by name, or is one of several behind a name."""


def task_sections(runs: Sequence[Run], names: Sequence[str]) -> list[Section]:
    """Returns the charts and the table; empty where no task was evaluated.

    Args:
        runs: The runs.
        names: Their names on the page.
    """
    points = [p for run, name in zip(runs, names, strict=True) for one in evaluations(run) for p in _points(name, one)]
    charted: dict[tuple[str, str], list[_Point]] = {}
    for point in points:
        if point.named:
            for metric in point.scores["metrics"]:
                charted.setdefault((point.task, metric), []).append(point)
    sections = [
        Section(
            f"{printable(task)}: {printable(metric)}",
            _NOTE.format(better=_WORDS[found[-1].scores["metrics"][metric].get("higher_is_better")]),
            html=to_html(_chart(found, metric, names), f"tasks-{number}"),
        )
        for number, ((task, metric), found) in enumerate(charted.items())
    ]
    return [*sections, *_tables(points, names)]


def _points(run: str, one: TaskEvaluation) -> Iterator[_Point]:
    asked = suffix(one["num_fewshot"], one["limit"])
    alone = not one["groups"]
    for name, scores in (*one["groups"].items(), *one["tasks"].items()):
        yield _Point(run, name + asked, one["step"], scores, alone or name == one["name"])


def _chart(points: Sequence[_Point], metric: str, names: Sequence[str]) -> go.Figure:
    figure = go.Figure()
    for number, name in enumerate(names):
        own = [p for p in points if p.run == name and p.scores["metrics"][metric]["value"] is not None]
        if not own:
            continue
        values = [p.scores["metrics"][metric] for p in own]
        figure.add_scatter(
            x=[p.step for p in own],
            y=[value["value"] for value in values],
            error_y={"type": "data", "array": [value["stderr"] or 0.0 for value in values], "thickness": 1, "width": 3},
            name=escaped(name),
            mode="lines+markers",
            line={"color": colour_of(number), "width": 1.6},
            marker={"size": 6},
        )
    return styled(figure, "step", escaped(metric), legend=len(names) > 1)


def _tables(points: Sequence[_Point], names: Sequence[str]) -> Iterator[Section]:
    """Yields, for each run, the newest scores of each task, those behind the name of a group included."""
    for name in names:
        newest = {point.task: point for point in sorted(points, key=lambda p: p.step) if point.run == name}
        rows = [
            [printable(p.task), f"{p.step:,}", printable(metric), _value(p, metric), f"{p.scores['documents']:,}"]
            for p in newest.values()
            for metric in p.scores["metrics"]
        ]
        if rows:
            of = "" if len(names) == 1 else f": {name}"
            yield Section(f"Tasks{of}", wide=True, head=["task", "step", "metric", "value", "documents"], rows=rows)


def _value(point: _Point, metric: str) -> str:
    found = point.scores["metrics"][metric]
    if found["value"] is None:
        return "not finite"
    return f"{found['value']:.4f}" + ("" if found["stderr"] is None else f" ± {found['stderr']:.4f}")
