"""The charts of the report, drawn with plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from pipeline.tracking.goodput import Goodput

_COLOURS = ("#2f6f9f", "#c8553d", "#4f8a5b", "#8a5a9e", "#b8862b", "#4c9a9a", "#a1506b", "#6b6b6b")
_PART_COLOURS = {
    "training": "#4f8a5b",
    "checkpoint": "#2f6f9f",
    "startup": "#b8862b",
    "queue": "#b9b9b9",
    "repeated": "#c8553d",
    "idle": "#8a5a9e",
}
_LABELLED = 8  # percent of a bar: a narrower part has no room for its name
_POINTS = 2000  # per curve: enough for any screen, and a run of a million steps stays a page of a few megabytes


@dataclass(frozen=True)
class Curve:
    """The values of one metric by step."""

    steps: Sequence[int]
    values: Sequence[float]

    def thinned(self, limit: int = _POINTS) -> Curve:
        """Returns the curve with at most `limit` points: the lowest and the highest value of each stretch."""
        if len(self.steps) <= limit:
            return self
        stretch = math.ceil(2 * len(self.steps) / limit)
        kept: list[int] = []
        for first in range(0, len(self.steps), stretch):
            block = range(first, min(first + stretch, len(self.steps)))
            # NaN is what a reader looks for, so it counts as the highest value.
            ordered = sorted(block, key=lambda i: math.inf if math.isnan(self.values[i]) else self.values[i])
            kept += sorted({ordered[0], ordered[-1]})
        return Curve([self.steps[i] for i in kept], [self.values[i] for i in kept])

    def lone(self) -> list[bool]:
        """Tells which finite values have no finite neighbour: no line reaches them, so they need a marker."""
        finite = [False, *map(math.isfinite, self.values), False]
        return [finite[i] and not (finite[i - 1] or finite[i + 1]) for i in range(1, len(finite) - 1)]


@dataclass(frozen=True)
class Series:
    """The curves of one run, its goodput, and the steps at which it restarted."""

    name: str
    curves: dict[str, Curve]
    restarts: Sequence[int]
    goodput: Goodput | None


def line_chart(runs: Sequence[Series], keys: Sequence[tuple[str, str]], unit: str, *, log: bool = False) -> go.Figure:
    """Draws metrics of all runs by step.

    Args:
        runs: The runs; each has a colour, and dotted lines in it mark restarts.
        keys: Each metric and its name in the legend; the first is solid, the rest dashed with markers.
        unit: Title of the vertical axis.
        log: Whether the vertical axis is logarithmic.
    """
    figure = go.Figure()
    restarts: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        for place, (key, label) in enumerate(keys):
            if key not in run.curves:
                continue
            curve = run.curves[key].thinned()
            marker = {"size": 5} if place > 0 else _lone_marker(curve)
            figure.add_scatter(
                x=list(curve.steps),
                y=list(curve.values),
                name=_legend(run, label, alone=len(runs) == 1, only=len(keys) == 1),
                mode="lines+markers" if marker else "lines",
                line={"color": colour if len(runs) > 1 else _COLOURS[place], "width": 1.6, "dash": _dash(place)},
                marker=marker,
            )
        line = {"color": colour, "width": 1, "dash": "dot"}
        across = {"type": "line", "y0": 0, "y1": 1, "yref": "y domain", "line": line, "opacity": 0.7}
        restarts += [{"x0": step, "x1": step, **across} for step in run.restarts]
    figure.update_layout(shapes=restarts)  # all at once: `add_vline` copies every existing line
    return _styled(figure, "step", unit, log=log, legend=len(runs) > 1 or len(keys) > 1)


def _legend(run: Series, label: str, *, alone: bool, only: bool) -> str:
    if alone:
        return label
    name = _plain(run.name)
    return name if only else f"{name} {label}"


def _plain(name: str) -> str:
    """Escapes a name for plotly, which reads texts as markup and knows few entities."""
    return html.escape(name, quote=False)


def _lone_marker(curve: Curve) -> dict[str, Any] | None:
    lone = curve.lone()
    if not any(lone):
        return None
    # Where sizes differ, plotly draws pale bubbles with a white edge.
    return {"size": [5 * one for one in lone], "opacity": 1, "line": {"width": 0}}


def time_chart(run: Series) -> go.Figure:
    """Draws where the time of a step was spent, stacked."""
    figure = go.Figure()
    parts = ("data", "forward_backward", "optimizer", "checkpoint_stall")
    for number, part in enumerate(parts):
        curve = run.curves.get(f"time/{part}_s")
        if curve is not None:
            thin = curve.thinned()
            marker = _lone_marker(thin)
            figure.add_scatter(
                x=list(thin.steps),
                y=[1000 * v for v in thin.values],
                name=part.replace("_", "-"),
                mode="lines+markers" if marker else "lines",
                line={"width": 0.8, "color": _COLOURS[number]},
                marker=marker,
                stackgroup="time",
            )
    return _styled(figure, "step", "ms per step")


def goodput_chart(runs: Sequence[Series]) -> go.Figure:
    """Draws where the wall time was spent, one bar per run."""
    figure = go.Figure()
    shown = [run for run in runs if run.goodput is not None and run.goodput.wall_s > 0]
    for part, colour in _PART_COLOURS.items():
        seconds = [run.goodput.parts()[part] for run in shown if run.goodput is not None]
        if not any(seconds):
            continue
        shares = [
            100 * s / run.goodput.wall_s for s, run in zip(seconds, shown, strict=True) if run.goodput is not None
        ]
        figure.add_bar(
            y=[_plain(run.name) for run in shown],
            x=shares,
            name=part,
            orientation="h",
            marker={"color": colour},
            text=[f"{part} {share:.0f}%" if share >= _LABELLED else "" for share in shares],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            customdata=seconds,
            hovertemplate="%{fullData.name}: %{customdata:.1f} s (%{x:.1f}%)<extra>%{y}</extra>",
        )
    figure.update_layout(barmode="stack")
    _styled(figure, "% of the wall time since submission", "")
    figure.update_layout(legend={"traceorder": "normal"})
    figure.update_xaxes(range=[0, 100])
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(height=170 + 34 * len(shown), hovermode="closest")
    return figure


def to_html(figure: go.Figure, name: str) -> str:
    """Returns the chart as an element for a page that already contains plotly's script."""
    buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]  # the default buttons also offer to upload the chart
    settings: dict[str, Any] = {"displaylogo": False, "responsive": True, "modeBarButtons": buttons}
    return figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=name, config=settings)


def _dash(place: int) -> str:
    return ("solid", "dash", "dot")[min(place, 2)]


def _styled(figure: go.Figure, across: str, up: str, *, log: bool = False, legend: bool = True) -> go.Figure:
    figure.update_layout(
        template="plotly_white",
        height=340,
        # The buttons and the legend stand above the plot.
        margin={"l": 64, "r": 16, "t": 56 if legend else 32, "b": 46},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        hovermode="x unified",
        showlegend=legend,
    )
    figure.update_xaxes(title=across, gridcolor="#eceff1", zeroline=False)
    figure.update_yaxes(title=up, gridcolor="#eceff1", zeroline=False, type="log" if log else "linear")
    return figure
