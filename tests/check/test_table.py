"""The table of checks: one line per check, cures below, totals at the end."""

from __future__ import annotations

import io

from rich.console import Console

from pipeline.check.result import Check
from pipeline.check.table import print_checks


def test_every_check_has_a_line_and_a_cure_follows_the_check_it_belongs_to():
    out = io.StringIO()
    results = [
        Check("disk", "ok", "enough"),
        Check("torch", "failed", "missing [x]", "install it"),
        Check("c", "warning", ""),
    ]
    print_checks(results, Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[:3] == [["ok", "disk", "enough"], ["failed", "torch", "missing", "[x]"], ["->", "install", "it"]]
    assert " ".join(lines[-1]) == "3 checks: 1 failed, 1 warning"
