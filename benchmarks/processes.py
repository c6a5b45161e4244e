"""Measures wall seconds, CPU seconds and peak memory of whole processes, start-up included."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Runs between the two, because a process inherits the peak of its parent, and a benchmark may be large.
_HELPER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
wall = time.perf_counter() - began
print(json.dumps([status, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3]))
"""


@dataclass(frozen=True)
class Usage:
    """Wall seconds, CPU seconds (all threads) and peak memory in MB of one process."""

    wall: float
    cpu: float
    peak_mb: float


def measure(command: Sequence[str]) -> Usage:
    """Runs a command to its end and returns what it used."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _HELPER, *command], stdout=subprocess.PIPE, check=True)
    status, wall, cpu, peak = json.loads(done.stdout)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed with {status}")
    return Usage(wall, cpu, peak)


def medians(runs: Sequence[Usage], megabytes: float) -> dict[str, Any]:
    """Returns the medians of several runs over the same text, and the CPU seconds of each."""
    cpu = statistics.median(run.cpu for run in runs)
    return {
        "runs": len(runs),
        "wall_s": round(statistics.median(run.wall for run in runs), 2),
        "cpu_s": round(cpu, 2),
        "mb_per_cpu_s": round(megabytes / cpu, 1),
        "peak_mb": round(max(run.peak_mb for run in runs)),
        "cpu_s_of_each_run": [round(run.cpu, 2) for run in runs],
    }
