"""The energy of a node's GPUs: added up from the sampled power, and read back for a whole run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.run import journal
from pipeline.run.folder import Run

_POWER = re.compile(r"gpu_\d+_power_usage_watts")
_JOULES, _SECONDS = "gpu_energy_joules", "gpu_metered_seconds"
# Over a longer gap nobody knows what the GPUs did.
_LONGEST_GAP_S = 60.0
# A sample of eight GPUs takes two kilobytes; there may be a thousand nodes.
_TAIL_BYTES = 1 << 16


class EnergyMeter:
    """Integrates the power of all GPUs that a node shows, by trapezoids between its samples.

    Its totals are part of every sample, and it begins with those of the newest one: so it continues across starts.
    """

    def __init__(self, newest: Mapping[str, float], prefix: str) -> None:
        """Begins with the totals in a node's newest record, whose keys have this prefix."""
        self._joules = newest.get(prefix + _JOULES)
        self._seconds = newest.get(prefix + _SECONDS, 0.0)
        self._before: tuple[float, float] | None = None

    def add(self, at_s: float, sample: Mapping[str, float]) -> dict[str, float]:
        """Counts a sample taken at a time in seconds; returns the totals, or nothing where power was never measured."""
        powers = [watts for name, watts in sample.items() if _POWER.fullmatch(name)]
        if powers:
            self._joules = self._joules or 0.0
            if self._before is not None and at_s - self._before[0] <= _LONGEST_GAP_S:
                gap = at_s - self._before[0]
                self._joules += gap * (sum(powers) + self._before[1]) / 2
                self._seconds += gap * len(powers)
        self._before = (at_s, sum(powers)) if powers else None
        if self._joules is None:
            return {}
        return {_JOULES: round(self._joules, 1), _SECONDS: round(self._seconds, 1)}


def gpu_energy(run: Run) -> tuple[float, float] | None:
    """Returns the joules that the GPUs of a run took and the GPU-seconds over which they were measured, or None."""
    totals = [_newest(file) for file in sorted(run.system_metrics.glob("*.jsonl"))]
    joules = [float(v) for total in totals for name, v in total.items() if name.endswith("/" + _JOULES)]
    seconds = [float(v) for total in totals for name, v in total.items() if name.endswith("/" + _SECONDS)]
    return (sum(joules), sum(seconds)) if joules else None


def _newest(file: Path) -> dict[str, float]:
    """Returns the last sample in a node's file without reading the whole of it."""
    newest: dict[str, float] = {}
    # The tail may begin within a line: what is left of it is not a JSON object, and the reader skips it.
    for line in journal.read_steps(file, max(0, journal.size(file) - _TAIL_BYTES)):
        newest = line.record
    return newest
