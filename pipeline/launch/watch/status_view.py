"""The output of `pipeline status`: a table of runs, or one run in detail."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.launch.watch.run_status import RunStatus
from pipeline.text_format import duration, printable, short

_COLOURS = {
    "queued": "yellow", "running": "green", "finished": "blue", "cancelled": "magenta", "failed": "red",
    "stopped": "yellow", "unknown": "yellow",
}  # fmt: skip
_WATCH_S = 5.0
_ANY_WIDTH = 1000


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
    """Returns a table of runs, or the details of a single one and a table of the runs that decay from it."""
    below = [place for _, place in _tree(found)[1:]]
    if len(found) == 1 or all(place == 1 for place in below):
        return Group(_details(found[0]), "", _Runs(found[1:])) if below else _details(found[0])
    return _Runs(found)


def _tree(found: Sequence[RunStatus]) -> list[tuple[RunStatus, int]]:
    """Returns the runs, each followed by those that branch from it, with how deep it is below the first."""
    places = {Path(one.run).resolve(): one for one in found}
    parents = {one.run: places.get(Path(one.parent).resolve()) if one.parent else None for one in found}
    ordered: list[tuple[RunStatus, int]] = []

    def add(one: RunStatus, depth: int) -> None:
        ordered.append((one, depth))
        for child in found:
            if parents[child.run] is one and child is not one:
                add(child, depth + 1)

    for one in found:
        if parents[one.run] is None:
            add(one, 0)
    known = {one.run for one, _ in ordered}
    return [*ordered, *((one, 0) for one in found if one.run not in known)]  # configs that name each other


class _Runs:
    """A table of runs, without its last-named columns where the screen has no room for them."""

    def __init__(self, found: Sequence[RunStatus]) -> None:
        self._found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = ["state", "step", "loss", "tok/s", "eta", "restarts", "goodput", "saved"]
        for unneeded in ("restarts", "goodput", "tok/s", "eta", "saved"):
            table = _table(self._found, columns)
            if console.measure(table, options=options.update(max_width=_ANY_WIDTH)).maximum <= options.max_width:
                break
            columns.remove(unneeded)
        yield _table(self._found, columns)


def _table(found: Sequence[RunStatus], columns: Sequence[str]) -> Table:
    table = Table("run", *columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    table.columns[0].overflow = "fold"
    for s, depth in _tree(found):
        name = "  " * (depth - 1) + f"└ {Path(s.run).name}" if depth else s.run
        cells: dict[str, Text | str] = {**_cells(s), "state": _state(s), "restarts": str(s.restarts)}
        cells["saved"] = cells["checkpoint"]
        table.add_row(name, *(cells[column] for column in columns))
    return table


def _details(s: RunStatus) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", s.run)
    table.add_row("state", _state(s))
    if s.reason:
        table.add_row("reason", Text(printable(s.reason), overflow="fold"))
    if s.hang:
        table.add_row("hang", Text(printable(s.hang), overflow="fold", style="red"))
    if s.job:
        table.add_row("job", f"{s.job}, {s.stage}" + (f", on {s.nodes}" if s.nodes else ""))
    summaries = {"goodput": s.wall.summary() if s.wall else "", "usage": s.usage.summary() if s.usage else ""}
    cells = _cells(s) | summaries
    for name, value in cells.items():
        if value:
            table.add_row(name, f"of step {value}" if name == "checkpoint" else value)
    if s.slowest is not None:
        own = f"{s.slowest.seconds:.3g} s before the first collective of a step, median {s.slowest.median_s:.3g} s"
        table.add_row("slowest", f"rank {s.slowest.rank}: {own}")
    table.add_row("restarts", str(s.restarts))
    for name, lines in (("from", s.origin), ("pinned", s.pinned)):
        if lines:
            table.add_row(name, Text(printable("\n".join(lines)), overflow="fold"))
    for title, numbers in (
        ("validation", {name: f"{loss:.4f}" for name, loss in s.validation.items()}),
        ("tokens seen", {name: short(count) for name, count in s.source_tokens.items()}),
    ):
        if numbers:
            text = ", ".join(f"{name} {value}" for name, value in numbers.items())
            table.add_row(title, Text(printable(text), overflow="fold"))
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
