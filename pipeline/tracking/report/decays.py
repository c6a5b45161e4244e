"""What the decays of a stable run reached: their curves, a table, and the loss after so many tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.run.folder import Run
from pipeline.run.related import SweepRun, read_branches
from pipeline.tracking.report.charts import WIDE, Series, colour_of, escaped, line_chart, styled, to_html
from pipeline.tracking.report.members import LOSS, Member, read_member, runs_table
from pipeline.tracking.report.page import Section
from pipeline.tracking.report.power_law import PowerLaw, fit

DECAY = "decay at"
"""What tables call the step from which a run decays."""


def decay_sections(stable: Run, series: Series) -> list[Section]:
    """Returns the curves of a stable run and its decays, and what each reached; nothing for any other run."""
    members = [read_member(SweepRun(one.run, {DECAY: str(one.step)})) for one in read_branches(stable)]
    if not members:
        return []
    known = [series, *(one.series for one in members if one.series is not None)]
    chart = to_html(line_chart(known, [(LOSS, "validation")], "nats per token", wide=True), "decays")
    note = "Validation loss of the stable run and of its decays."
    curves = [Section("Decays", note, wide=True, html=chart)] if any(LOSS in one.curves for one in known) else []
    return [*curves, runs_table(members, "Decays by final validation loss"), *loss_by_tokens({series.name: members})]


def loss_by_tokens(decays: Mapping[str, Sequence[Member]]) -> list[Section]:
    """Draws the final losses of the decays against tokens and compute, a line per stable run.

    Args:
        decays: The decays of each stable run, by its name.
    """
    lines = {name: found for name, members in decays.items() if len(found := _points(members)) > 1}
    if not lines:
        return []
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.03)
    laws: list[str] = []
    for number, (name, points) in enumerate(lines.items()):
        style = {"color": colour_of(number)}
        law = fit([tokens for tokens, _, _ in points], [loss for _, _, loss in points])
        for column in (0, 1):
            figure.add_trace(
                go.Scatter(
                    x=[point[column] for point in points], y=[loss for _, _, loss in points], name=escaped(name),
                    mode="markers" if law and column == 0 else "lines+markers", marker={**style, "size": 8},
                    line={**style, "width": 1.2}, showlegend=column == 1,
                ),
                row=1, col=column + 1,
            )  # fmt: skip
        if law is not None:
            laws.append(_in_words(name, law, len(points)))
            x = np.geomspace(points[0][0], points[-1][0], 60)
            trace = go.Scatter(x=x.tolist(), y=[law.at(tokens) for tokens in x], mode="lines", showlegend=False,
                               line={**style, "width": 1.2, "dash": "dash"}, hoverinfo="skip")  # fmt: skip
            figure.add_trace(trace, row=1, col=1)
    styled(figure, "", "", legend=len(lines) > 1, width=WIDE)
    for column, title in ((1, "tokens"), (2, "FLOPs of training")):
        figure.update_xaxes(title=title, type="log", exponentformat="e", dtick="D2", row=1, col=column)
    figure.update_yaxes(title="validation loss", row=1, col=1)
    figure.update_layout(hovermode="closest")
    dashed = "Dashed: a power law in the tokens D through the points; its limit is an extrapolation. " if laws else ""
    title = "Final loss after the decay"
    return [Section(title, dashed + "; ".join(laws), wide=True, html=to_html(figure, "loss-by-tokens"))]


def _points(members: Sequence[Member]) -> list[tuple[float, float, float]]:
    """Returns tokens, FLOPs and final validation loss of the decays that have finished, by tokens."""
    found = []
    for one in members:
        tokens, flops, rate = (one.last(f"train/{key}") for key in ("tokens_seen", "flops_per_s", "tokens_per_s"))
        if one.state == "finished" and math.isfinite(one.loss) and tokens and flops and rate:
            found.append((tokens, tokens * flops / rate, one.loss))
    return sorted(found)


def _in_words(name: str, law: PowerLaw, points: int) -> str:
    term = f"({law.scale ** (1 / law.exponent):,.3g} / D)^{law.exponent:.2f}"
    return f"{name}: {law.limit:.3f} + {term}, {points} points, rms distance {law.residual:.4f}"
