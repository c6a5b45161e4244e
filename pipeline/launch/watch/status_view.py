"""The output of `pipeline status`: a table of runs, or one run in detail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.launch.watch.status import RunStatus
from pipeline.text_format import duration, printable, short

_COLOURS = {
    "queued": "yellow", "running": "green", "finished": "blue", "cancelled": "magenta", "failed": "red",
    "stopped": "yellow", "unknown": "yellow",
}  # fmt: skip
_WATCH_S = 5.0


def watch(read: Callable[[], list[RunStatus]], console: Console) -> None:
    """Shows the status of runs every five seconds until Ctrl-C."""
    with Live(view(read()), console=console, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(_WATCH_S)
                live.update(view(read()), refresh=True)
        except KeyboardInterrupt:
            return


def view(found: Sequence[RunStatus]) -> RenderableType:
    """Returns a table of runs, or the details of a single one."""
    return _details(found[0]) if len(found) == 1 else _table(found)


def _table(found: Sequence[RunStatus]) -> Table:
    # Fits into 80 columns with usual names; the name of the run is folded first.
    table = Table(
        "run", "state", "step", "loss", "tok/s", "eta", "restarts", "goodput", "saved", box=None, pad_edge=False
    )
    for column in table.columns[2:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    for s in found:
        cells = _cells(s)
        table.add_row(
            s.run, _state(s), cells["step"], cells["loss"], cells["tok/s"], cells["eta"], str(s.restarts),
            cells["goodput"], cells["checkpoint"],
        )  # fmt: skip
    return table


def _details(s: RunStatus) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", s.run)
    table.add_row("state", _state(s))
    if s.reason:
        table.add_row("reason", Text(printable(s.reason), overflow="fold"))
    if s.job:
        table.add_row("job", f"{s.job}, {s.stage}" + (f", on {s.nodes}" if s.nodes else ""))
    cells = _cells(s) | {"goodput": "" if s.wall is None else s.wall.summary()}
    for name, value in cells.items():
        if value:
            table.add_row(name, f"of step {value}" if name == "checkpoint" else value)
    table.add_row("restarts", str(s.restarts))
    if s.updated is not None:
        table.add_row("last line", f"{duration(max(0.0, time.time() - s.updated))} ago")
    return table


def _state(s: RunStatus) -> Text:
    what = f"{s.state} ({s.stage})" if s.state in ("queued", "running", "failed") and s.stage else s.state
    return Text(what, style=_COLOURS[s.state])


def _cells(s: RunStatus) -> dict[str, str]:
    return {
        "step": f"{s.step}/{s.max_iters}",
        "loss": "" if s.loss is None else f"{s.loss:.4f}",
        "tok/s": "" if s.tokens_per_s is None else short(s.tokens_per_s),
        "eta": "" if s.eta_s is None else duration(s.eta_s),
        "goodput": "" if s.goodput is None else f"{s.goodput:.1%}",
        "checkpoint": "" if s.checkpoint is None else str(s.checkpoint),
    }
