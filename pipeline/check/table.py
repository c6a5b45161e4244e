"""The table that `pipeline check` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.check.result import Check
from pipeline.text_format import printable

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red"}


def print_checks(checks: Sequence[Check], console: Console) -> None:
    """Prints one line per check, the cure below it where there is one, and the totals."""
    table = Table.grid(padding=(0, 2))
    for check in checks:
        table.add_row(Text(check.status, _COLOURS[check.status]), check.name, Text(printable(check.found)))
        if check.cure:
            table.add_row("", "", Text(printable(f"-> {check.cure}")))
    console.print(table)
    failed, warned = (sum(c.status == status for c in checks) for status in ("failed", "warning"))
    console.print(f"{len(checks)} checks: {failed} failed, {warned} warning{'s' if warned != 1 else ''}")
