"""Where the seconds of a step go."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable

from pipeline.checkpoint.saver import Saved

# Assumed duration of a save until the first one has been measured.
UNKNOWN_SAVE_S = 10.0
_RECENT = 100  # steps
STALL = "checkpoint_stall"
"""The lap of what a save makes the loop wait."""


def every(step: int, interval: int) -> bool:
    """Whether what happens at this interval is due after `step` finished steps."""
    return step % interval == 0


class StepClock:
    """Adds up the host's seconds between laps, by name, over the steps of a log interval.

    On a GPU the host runs ahead of the device: the step time is right over an interval, but a lap is only the time
    until its work was launched or waited for.
    """

    def __init__(self) -> None:
        self._last = self._began = time.perf_counter()
        self._laps: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._step_began: float | None = None  # of the first step None: it also compiles and warms up
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.longest_pause_s = 0.0

    @property
    def longest_step_s(self) -> float:
        """Seconds of the longest recent step; 0 before the second of this start has ended."""
        return max(self._recent, default=0.0)

    def lap(self, name: str) -> None:
        """Adds the time since the last lap to `name`."""
        now = time.perf_counter()
        self._laps[name] += now - self._last
        if name == STALL:  # the time for a save is allowed for by itself
            self._leave_out(now)
        self._last = now

    def step_done(self) -> None:
        """Counts a finished step."""
        now = time.perf_counter()
        if self._step_began is not None:
            self._recent.append(now - self._step_began)
        self._step_began = now
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Returns mean seconds per step since the last reading, by name, and the total as `step`."""
        now = time.perf_counter()
        steps = max(1, self._steps)
        means = {name: seconds / steps for name, seconds in self._laps.items()} | {"step": (now - self._began) / steps}
        self._laps.clear()
        self._began = self._last = now
        self._steps = 0
        return means

    def pause(self) -> None:
        """Excludes the time since the last lap, for example a validation, from the time of a step."""
        self.longest_pause_s = max(self.longest_pause_s, time.perf_counter() - self._last)
        self.skip()

    def skip(self) -> None:
        """Excludes the time since the last lap, which will not come again, from the time of a step."""
        now = time.perf_counter()
        self._began += now - self._last
        self._leave_out(now)
        self._last = now

    def _leave_out(self, now: float) -> None:
        if self._step_began is not None:
            self._step_began = min(now, self._step_began + now - self._last)


def longest_save_s(saves: Iterable[Saved]) -> float:
    """Returns the seconds of the longest durable save; a failed one may have waited for its time limit."""
    return max((saved.seconds for saved in saves if saved.path is not None), default=UNKNOWN_SAVE_S)
