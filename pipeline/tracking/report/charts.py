"""The charts of the report, drawn with plotly."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from pipeline.tracking.goodput import Goodput
from pipeline.tracking.usage import Usage

COLOURS = ("#2f6f9f", "#c8553d", "#4f8a5b", "#8a5a9e", "#b8862b", "#4c9a9a", "#a1506b", "#6b6b6b")
_PART_COLOURS = {
    "training": "#4f8a5b",
    "checkpoint": "#2f6f9f",
    "startup": "#b8862b",
    "queue": "#b9b9b9",
    "repeated": "#c8553d",
    "idle": "#8a5a9e",
}
WIDE, _HALF = 1000, 400  # pixels of a chart's legend
_LEGEND_ROW = 20
_LABELLED = 8  # percent of a bar: a narrower part has no room for its name
# Points of a chart: each stretch of it has two, so one more would be narrower than a pixel; and the page stays small.
_POINTS = 2000
_MOST_PER_CURVE = 1000
_FEWEST_PER_CURVE = 100
_FEW = 40  # points of a curve that are shown one by one
_MOST_NAMED = 12  # restarts of a chart that have room for a name


def colour_of(number: int) -> str:
    """Returns the colour of one line among many: eight that are easy to tell apart, and behind them ever other ones."""
    if number < len(COLOURS):
        return COLOURS[number]
    # By the golden angle no two hues are near each other for long, and those that are differ in lightness.
    return f"hsl({number * 137.508 % 360:.0f},45%,{(32, 45, 58)[number % 3]}%)"


@dataclass(frozen=True)
class Curve:
    """The values of one metric by step."""

    steps: Sequence[int]
    values: Sequence[float]

    def thinned(self, limit: int) -> Curve:
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

    def rounded(self) -> list[float]:
        """Returns the values in the six digits that a chart can show: a third of their text."""
        return [float(f"{value:.6g}") for value in self.values]

    def lone(self) -> list[bool]:
        """Tells which finite values have no finite neighbour: no line reaches them, so they need a marker."""
        finite = [False, *map(math.isfinite, self.values), False]
        return [finite[i] and not (finite[i - 1] or finite[i + 1]) for i in range(1, len(finite) - 1)]


@dataclass(frozen=True)
class Series:
    """The curves of one run, its goodput, its cost, and the steps at which it restarted."""

    name: str
    curves: dict[str, Curve]
    restarts: Sequence[int]
    goodput: Goodput | None
    usage: Usage | None = None


def line_chart(
    runs: Sequence[Series], keys: Sequence[tuple[str, str]], unit: str, *, log: bool = False, wide: bool = False
) -> go.Figure:
    """Draws metrics of all runs by step.

    Args:
        runs: The runs; each has a colour, and dotted lines in it mark restarts.
        keys: Each metric and its name in the legend; the first is solid, the rest dashed with markers.
        unit: Title of the vertical axis.
        log: Whether the vertical axis is logarithmic.
        wide: Whether it has the whole width of the page, as a chart of several metrics has.
    """
    figure = go.Figure()
    limit = _limit(sum(key in run.curves for run in runs for key, _ in keys))
    for number, run in enumerate(runs):
        colour = colour_of(number)
        for place, (key, label) in enumerate(keys):
            if key not in run.curves:
                continue
            curve = run.curves[key].thinned(limit)
            marker = _marker(curve, every=place > 0)
            figure.add_scatter(
                x=list(curve.steps),
                y=curve.rounded(),
                name=_legend(run, label, alone=len(runs) == 1, only=len(keys) == 1),
                mode="lines+markers" if marker else "lines",
                line={
                    "color": colour if len(runs) > 1 else colour_of(place),
                    "width": 1.6,
                    "dash": _dash(place),
                },
                marker=marker,
            )
    several = wide or len(keys) > 1
    styled(figure, "step", unit, log=log, legend=several or len(runs) > 1, width=WIDE if several else _HALF)
    if len({value for curve in figure.data for value in curve.y}) == 1 and not log:
        figure.update_yaxes(rangemode="tozero")  # plotly would show a constant within 1 of it
    _add_restarts(figure, runs, named=several)
    return figure


def _limit(curves: int) -> int:
    return max(_FEWEST_PER_CURVE, min(_MOST_PER_CURVE, _POINTS // max(1, curves)))


def _add_restarts(figure: go.Figure, runs: Sequence[Series], named: bool) -> None:
    """Draws a dotted line at each restart; its run is told in writing where there is room, else where one points."""
    named = named and sum(len(run.restarts) for run in runs) <= _MOST_NAMED
    last = max((x for curve in figure.data for x in curve.x), default=0)
    for number, run in enumerate(runs):
        if not run.restarts:
            continue
        name = "restart" if len(runs) == 1 else f"{escaped(run.name)} restarted"
        height = 0.96 - 0.08 * (number % _MOST_NAMED)
        figure.add_scatter(
            x=[x for step in run.restarts for x in (step, step, step, None)],
            y=[0, height, 1, None] * len(run.restarts),
            yaxis="y2",
            name=name,
            showlegend=False,
            mode="lines+text" if named else "lines",
            text=["", name, "", ""] * len(run.restarts) if named else None,
            textposition=[
                f"middle {'left' if step > 0.75 * last else 'right'}" for step in run.restarts for _ in range(4)
            ],
            textfont={"size": 11, "color": (colour := colour_of(number))},
            line={"color": colour, "width": 1, "dash": "dot"},
            opacity=0.8,
            hovertemplate=f"{name} at step %{{x}}<extra></extra>",
        )
    figure.update_layout(yaxis2={"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True})


def _legend(run: Series, label: str, *, alone: bool, only: bool) -> str:
    if alone:
        return label
    name = escaped(run.name)
    return name if only else f"{name} {label}"


def escaped(name: str) -> str:
    """Returns a name escaped for plotly, which reads texts as markup and knows few entities."""
    return html.escape(name, quote=False)


def _marker(curve: Curve, every: bool = False) -> dict[str, Any] | None:
    """Returns the marker of a curve: at every point, or where a point would not be seen without one."""
    if every or 1 < len(curve.steps) <= _FEW:
        return {"size": 5}
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
            thin = curve.thinned(_limit(len(parts)))
            marker = _marker(thin)
            figure.add_scatter(
                x=list(thin.steps),
                y=Curve(thin.steps, [1000 * value for value in thin.values]).rounded(),
                name=part.replace("_", "-"),
                mode="lines+markers" if marker else "lines",
                line={"width": 0.8, "color": COLOURS[number]},
                marker=marker,
                stackgroup="time",
            )
    return styled(figure, "step", "ms per step")


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
            y=[escaped(run.name) for run in shown],
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
    styled(figure, "% of the wall time since submission", "")
    figure.update_layout(legend={"traceorder": "normal"})
    figure.update_xaxes(range=[0, 100])
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(height=136 + 34 * len(shown), hovermode="closest")
    return figure


def to_html(figure: go.Figure, name: str) -> str:
    """Returns the chart as an element for a page that already contains plotly's script."""
    buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]  # the default buttons also offer to upload the chart
    settings: dict[str, Any] = {"displaylogo": False, "responsive": True, "modeBarButtons": buttons}
    return figure.to_html(full_html=False, include_plotlyjs=False, include_mathjax=False, div_id=name, config=settings)


def _dash(place: int) -> str:
    return ("solid", "dash", "dot")[min(place, 2)]


def styled(
    figure: go.Figure, across: str, up: str, *, log: bool = False, legend: bool = True, width: int = _HALF
) -> go.Figure:
    """Gives a chart the look of the report and the titles of its axes; `width` is the pixels of its legend."""
    rows = _legend_rows([curve.name or "" for curve in figure.data], width) if legend else 0
    figure.update_layout(
        template="plotly_white",
        height=310 + _LEGEND_ROW * rows,
        # The buttons stand above the plot, the legend below it.
        margin={"l": 64, "r": 16, "t": 32, "b": 46 + _LEGEND_ROW * rows},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#24292f"},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hovermode="x unified",
        showlegend=legend,
    )
    figure.update_xaxes(title=across, gridcolor="#eceff1", zeroline=False)
    figure.update_yaxes(title=up, gridcolor="#eceff1", zeroline=False, type="log" if log else "linear")
    return figure


def _legend_rows(names: Sequence[str], width: int) -> int:
    """Returns how many lines a legend takes, whose columns are all as wide as the widest."""
    column = 44 + 7 * max(map(len, names), default=0)
    return -(-len(names) // max(1, width // column))
