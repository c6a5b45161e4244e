"""How much of the time a run gets further when nodes fail: Daly's model, with saves in the background."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Failures:
    """What failures cost a job.

    Attributes:
        mtbf_s: Mean seconds between two failures of the whole job.
        restart_s: From a failure to the first new step, the queue included.
        stall_s: How long a save holds training up.
        save_s: From the beginning of a save until it is durable.
    """

    mtbf_s: float
    restart_s: float
    stall_s: float
    save_s: float

    def goodput(self, interval_s: float) -> float:
        """Expected part of the time that is new work, for failures at random (Daly 2006, the complete model).

        A failure also costs what was done since the newest durable checkpoint was begun: one under way counts for
        nothing.

        Args:
            interval_s: Seconds of training between two saves; at least `save_s`, for saves do not overlap.
        """
        interval = max(interval_s, self.save_s)
        lost = self.restart_s + self.save_s
        segment = (interval + self.stall_s) / self.mtbf_s
        if lost / self.mtbf_s + segment > 700:  # exp would overflow; nothing is ever finished
            return 0.0
        return interval / (self.mtbf_s * math.exp(lost / self.mtbf_s) * math.expm1(segment))

    def best_interval_s(self) -> float:
        """The interval with the highest goodput: Daly's estimate (2006), which is Young's for rare failures.

        The stall is what an interval pays; no interval is shorter than a save takes.
        """
        ratio = self.stall_s / (2 * self.mtbf_s)
        if ratio >= 1:
            return max(self.mtbf_s, self.save_s)
        best = math.sqrt(2 * self.stall_s * self.mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - self.stall_s
        return max(best, self.save_s)
