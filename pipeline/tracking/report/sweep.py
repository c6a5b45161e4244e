"""The report of a sweep: its runs by their final validation loss, and that loss against what was swept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.errors import UsageError
from pipeline.run.folder import Run
from pipeline.run.related import SweepRun, read_branches, read_sweep
from pipeline.tracking.report.charts import COLOURS, escaped, line_chart, styled, to_html
from pipeline.tracking.report.decays import DECAY, loss_by_tokens
from pipeline.tracking.report.members import LOSS, Member, keys_of, read_member, runs_table, short_key
from pipeline.tracking.report.page import Section
from pipeline.tracking.report.report import comparison, page
from pipeline.tracking.report.series import has_metrics

_PANELS = 4
# Values whose largest is so many times the smallest are shown on a logarithmic axis.
_WIDE = 8.0


def write_sweep_report(folder: Path, output: Path | None = None) -> Path:
    """Writes the report of a sweep and returns its file: by default in the sweep's folder.

    A run that failed, or whose folder is missing or damaged, is a line of the table.

    Raises:
        UsageError: No run has metrics yet.
        PipelineError: The file cannot be written.
    """
    home = Run(folder)
    swept = read_sweep(folder)
    decays = {one.run.name: _decays(one) for one in swept}
    members = [*map(read_member, swept), *(member for of_run in decays.values() for member in of_run)]
    series = [one.series for one in members if one.series is not None]
    if not has_metrics(series):
        raise UsageError(f"{folder}: nothing to report yet: no run of this sweep has metrics")
    sections = [runs_table(members, "Runs by final validation loss"), *loss_by_tokens(decays)]
    sections += _scatter([member for member in members if DECAY not in member.values])
    for number, (key, title, unit) in enumerate(
        ((LOSS, "Validation loss", "nats per token"), ("train/loss", "Training loss", "nats per token"))
    ):
        if any(key in one.curves for one in series):
            chart = to_html(line_chart(series, [(key, title)], unit, wide=True), f"curve-{number}")
            sections.append(Section(title, wide=True, html=chart))
    return page(home.name, [], [*sections, comparison(series)], output or home.report_file)


def _decays(one: SweepRun) -> list[Member]:
    found = [SweepRun(branch.run, {**one.values, DECAY: str(branch.step)}) for branch in read_branches(one.run)]
    return [read_member(branch) for branch in found]


def _scatter(members: Sequence[Member]) -> list[Section]:
    """Draws the final validation loss against each swept key that has several values, one panel per key."""
    done = [one for one in members if math.isfinite(one.loss)]
    keys = [key for key in keys_of(done) if len({one.values.get(key) for one in done}) > 1][:_PANELS]
    if not keys:
        return []
    figure = make_subplots(rows=1, cols=len(keys), shared_yaxes=True, horizontal_spacing=0.03)
    for column, key in enumerate(keys, 1):
        own = [one for one in done if key in one.values]
        numbers = [_number(one.values[key]) for one in own]
        numeric = None not in numbers
        figure.add_trace(
            go.Scatter(
                x=numbers if numeric else [escaped(one.values[key]) for one in own],
                y=[one.loss for one in own],
                text=[escaped(one.name) for one in own],
                mode="markers",
                marker={"size": 9, "color": COLOURS[0], "opacity": 0.75},
                hovertemplate="%{text}<br>%{x}: %{y:.4f}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    styled(figure, "", "", legend=False)
    for column, key in enumerate(keys, 1):
        texts = [one.values[key] for one in done if key in one.values]
        known = [number for text in texts if (number := _number(text)) is not None]
        kind = "category" if len(known) < len(texts) else "log" if _is_wide(known) else "linear"
        figure.update_xaxes(title=escaped(short_key(key, keys)), type=kind, row=1, col=column)
    figure.update_yaxes(title="validation loss", row=1, col=1)
    figure.update_xaxes(exponentformat="e")
    figure.update_layout(hovermode="closest")
    return [Section("Final validation loss by value", wide=True, html=to_html(figure, "sweep"))]


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_wide(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) >= _WIDE * min(numbers)
