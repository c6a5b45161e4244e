"""The share of time that is new work when nodes fail: Daly's model, with saves in the background."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """The cost of failures to a job."""

    mtbf_s: float
    """Mean seconds between two failures of the whole job."""
    restart_s: float
    """Seconds from a failure to the first new step, time in the queue included."""
    stall_s: float
    """Seconds that a save stalls training."""
    save_s: float
    """Seconds from the start of a save until it is durable."""

    def goodput(self, interval_s: float) -> float:
        """Returns the expected share of time that is new work, for random failures (Daly 2006, the complete model).

        A failure also costs the work since the newest durable checkpoint was begun: a save in progress is lost.

        Args:
            interval_s: Seconds of training between two saves; raised to `save_s`, because saves do not overlap.
        """
        interval = max(interval_s, self.save_s)
        lost = self.restart_s + self.save_s
        segment = (interval + self.stall_s) / self.mtbf_s
        if lost / self.mtbf_s + segment > 700:  # exp would overflow; no interval is ever finished
            return 0.0
        return interval / (self.mtbf_s * math.exp(lost / self.mtbf_s) * math.expm1(segment))

    def best_interval_s(self) -> float:
        """Returns the interval with the highest goodput: Daly's estimate (2006), which is Young's for rare failures.

        Each interval costs one stall; no interval is shorter than a save.
        """
        ratio = self.stall_s / (2 * self.mtbf_s)
        if ratio >= 1:
            return max(self.mtbf_s, self.save_s)
        best = math.sqrt(2 * self.stall_s * self.mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall_s
        return max(best, self.save_s)
