"""The table that `pipeline check` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.check.result import Check

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Prints one line per check, the cure below it where there is one, and the totals."""
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row(f"[{_COLOURS[check.status]}]{check.status}[/]", check.name, escape(check.found))
        if check.cure:
            table.add_row("", "", f"-> {escape(check.cure)}")
    console.print(table)
    failed, warned = (sum(c.status == status for c in checks) for status in ("failed", "warning"))
    console.print(f"{len(checks)} checks: {failed} failed, {warned} warning{'s' if warned != 1 else ''}")
