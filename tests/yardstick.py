"""Measures a start of the program by that of a plain interpreter: a slow machine must not look like a fault."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

_PLAIN = "import asyncio, concurrent.futures, email.message, http.client, sqlite3, unittest.mock, xml.dom.minidom"


def cpu_s(*argv: str) -> float:
    """Runs a command, which must succeed; returns the CPU seconds of it and of the processes it waited for."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, argv
    return used.ru_utime + used.ru_stime


def in_plain_starts(measure: Callable[[], float], rounds: int = 4) -> float:
    """Returns CPU seconds in units of a new interpreter that imports a fixed part of the standard library.

    Both are taken by turns, and the least of each counts: a processor that is slow for a while, or shared, slows both.
    """
    pairs = [(measure(), cpu_s(sys.executable, "-c", _PLAIN)) for _ in range(rounds)]
    measured, plain = zip(*pairs, strict=True)
    return min(measured) / min(plain)
