"""What each rank is doing: rank 0 finds the one that hangs or is slow, and a profile shows the names of the phases."""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

_STEPS = 20


@dataclass(frozen=True)
class Doing:
    """What a rank was doing at one moment."""

    step: int
    """Finished steps."""
    phase: str
    """For example `data`, `forward`, `backward`; empty between phases."""
    phases: int
    """Phases begun since the start; all ranks begin the same ones in the same order."""
    collectives: int
    """Collectives begun since the start."""
    own_s: float | None
    """Mean seconds of the last steps before their first collective; None before the first step."""

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)

    @property
    def place(self) -> tuple[int, int]:
        """How far this rank is: of two ranks, the one with the smaller place is behind."""
        return self.phases, self.collectives


class Activity:
    """What this rank is doing; the main thread sets it, and any thread reads it.

    Args:
        device: Where the rank trains. On a GPU the host runs ahead, and the device's seconds count.
    """

    def __init__(self, device: torch.device) -> None:
        self.named = False
        """Whether phases are named to PyTorch's profiler, which costs some microseconds each."""
        self._step, self._phase, self._phases = 0, "", 0
        self._alone = False  # whether this step has had no collective yet
        self._mark: Callable[[], Any] = time.perf_counter
        self._between: Callable[[Any, Any], float | None] = lambda begin, end: end - begin
        if device.type == "cuda":
            self._mark, self._between = _event, _event_seconds
        self._began = self._mark()
        self._own: deque[tuple[Any, Any]] = deque(maxlen=_STEPS)

    def begin_step(self, step: int) -> None:
        """Notes that a step begins after so many finished ones."""
        self._step, self._alone, self._began = step, True, self._mark()

    def begin_collective(self) -> None:
        """Notes that a collective begins."""
        if self._alone:
            self._alone = False
            self._own.append((self._began, self._mark()))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what the block does."""
        outer, self._phase = self._phase, name
        self._phases += 1
        if self.named:
            with torch.profiler.record_function(name):
                yield
        else:
            yield
        self._phase = outer

    def now(self) -> Doing:
        """Returns what this rank is doing."""
        own = [self._between(*pair) for pair in list(self._own)]
        known = [seconds for seconds in own if seconds is not None]
        mean = sum(known) / len(known) if known else None
        return Doing(self._step, self._phase, self._phases, _collectives(), mean)


@dataclass(frozen=True)
class Seen:
    """A rank as it was last heard."""

    host: str
    doing: Doing
    at: float
    """When, by the monotonic clock."""


@dataclass(frozen=True)
class Slowest:
    """The rank for which the other ranks wait longest."""

    rank: int
    seconds: float
    """Its mean time before the first collective of a step."""
    median_s: float
    """The median of all ranks; of two, the faster."""


class Roster:
    """All ranks, as rank 0 knows them; any thread may use it.

    Args:
        own: What rank 0 itself is doing.
    """

    def __init__(self, own: Activity) -> None:
        self._own = own
        self._seen: dict[int, Seen] = {}
        self._lock = threading.Lock()
        self._clock: Callable[[], float] = time.monotonic

    def hear(self, rank: int, host: str, doing: Doing) -> None:
        """Notes what a rank says it is doing."""
        with self._lock:
            self._seen[rank] = Seen(host, doing, self._clock())

    def all(self) -> dict[int, Seen]:
        """Returns every rank that has been heard, rank 0 included."""
        with self._lock:
            return {0: Seen(socket.gethostname(), self._own.now(), self._clock()), **self._seen}

    def missing(self, silence_s: float) -> dict[int, Seen]:
        """Returns the ranks for which the other ranks wait; none if all have come equally far.

        Args:
            silence_s: A rank that has said nothing for so long cannot have come.
        """
        seen, now = self.all(), self._clock()
        silent = {rank: one for rank, one in seen.items() if now - one.at > silence_s}
        if silent:
            return silent
        furthest = max(one.doing.place for one in seen.values())
        return {rank: one for rank, one in seen.items() if one.doing.place < furthest}

    def metrics(self) -> dict[str, float]:
        """Returns the slowest rank as metrics; none where it is not known, as on every rank but the first."""
        slowest = self.slowest()
        if slowest is None:
            return {}
        return {
            "ranks/slowest": slowest.rank,
            "ranks/slowest_s": slowest.seconds,
            "ranks/median_s": slowest.median_s,
        }

    def slowest(self) -> Slowest | None:
        """Returns the slowest rank; None where the times of two ranks are not known."""
        own = {rank: one.doing.own_s for rank, one in self.all().items()}
        known = {rank: seconds for rank, seconds in own.items() if seconds is not None}
        if len(known) < 2:
            return None
        rank = max(known, key=lambda rank: known[rank])
        return Slowest(rank, known[rank], statistics.median_low(known.values()))


def _collectives() -> int:
    """Returns how many collectives this rank has begun, in all groups together."""
    if not dist.is_initialized():
        return 0
    groups = list(dist.distributed_c10d._world.pg_map)
    try:
        return sum(group._get_sequence_number_for_group() for group in groups)  # type: ignore[attr-defined]
    except RuntimeError:  # a group that is just being made or destroyed
        return 0


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _event_seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
    try:
        return begin.elapsed_time(end) / 1000 if end.query() else None
    except RuntimeError:  # the device has failed, which the main thread will say
        return None
