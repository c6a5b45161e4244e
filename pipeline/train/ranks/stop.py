"""Stopping on request: a signal only sets a flag, on which the ranks agree at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.errors import StopRequested, UsageError
from pipeline.run.world import DEADLINE_VARIABLE

# torchrun and some Slurm process trackers deliver one Ctrl-C twice; a second press by hand comes later than this.
_SAME_PRESS_S = 0.5

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
_EXIT_INTERRUPTED = 130


class StopRequest:
    """Whether this process was asked to stop; inside the context, signals request a stop and do nothing else.

    The context may be entered again while it is open.

    SIGUSR2, SIGTERM and SIGINT request it; a second Ctrl-C exits at once. The launcher may set a wall-clock limit in
    PIPELINE_DEADLINE (Unix seconds): the stop is requested while there is still time for the last steps and a save.
    """

    def __init__(self) -> None:
        self.reason: str | None = None  # the signal's name or `time limit`; None until a stop is requested
        self._first_interrupt = 0.0
        self._previous: dict[int, Any] = {}
        self._entered = 0
        self._deadline = _deadline()

    def refuse(self) -> None:
        """Ends a start that was asked to stop before anything was trained.

        Raises:
            StopRequested: It was.
        """
        if self.reason is not None:
            raise StopRequested(f"stopped by {self.reason} before training began; nothing was trained")

    @property
    def requested(self) -> bool:
        """Whether to stop at the end of this step."""
        return self.reason is not None

    def message(self, step: int) -> str:
        """Returns what the person who stopped the run after this step is told."""
        reason = self.reason or "another rank was asked"
        return f"stopped on request ({reason}) after step {step}; everything is saved: the same command resumes the run"

    def request(self, reason: str) -> None:
        """Requests a stop; the first reason wins."""
        self.reason = self.reason or reason

    def check_time(self, step_s: float, save_s: float, between_s: float) -> None:
        """Requests a stop if the time left does not suffice for three more steps and a save.

        The ranks agree in the next step and may learn of it in the one after; the third allows for a slow step.

        Args:
            step_s: Seconds of the longest recent step.
            save_s: Seconds until a checkpoint is durable.
            between_s: Seconds of whatever else comes before the save.
        """
        if self._deadline is not None and time.time() + 3 * step_s + 1.5 * save_s + between_s > self._deadline:
            self.request("time limit")

    def __enter__(self) -> Self:
        if not self._entered:
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if not self._entered:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self._first_interrupt and now - self._first_interrupt > _SAME_PRESS_S:
            os._exit(_EXIT_INTERRUPTED)
        if number == signal.SIGINT and not self._first_interrupt:
            self._first_interrupt = now
        self.request(signal.Signals(number).name)


def _deadline() -> float | None:
    given = os.environ.get(DEADLINE_VARIABLE)
    try:
        return float(given) if given else None
    except ValueError as error:
        raise UsageError(f"{DEADLINE_VARIABLE}={given}: must be Unix seconds, as `date +%s` prints them") from error
