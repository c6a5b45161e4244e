"""The faults: each strikes running ranks and says which exit statuses they may end with."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import EXIT_FAILED, EXIT_STOPPED
from tests import experiment
from tests.faults.disk import full, read_only
from tests.faults.injected import CALLS, FAILURES, Plan
from tests.processes import Ranks

KILLED = -signal.SIGKILL


@dataclass
class Blow:
    """A fault that was inflicted."""

    kind: str
    statuses: frozenset[int]
    """Exit statuses that ranks may end with, unless the run finished meanwhile."""
    afterwards: Callable[[], None] = lambda: None
    """Called when all ranks have ended."""
    problem: str | None = None
    """What has already gone wrong."""

    def allowed(self, codes: dict[int, int], finished: bool) -> bool:
        """Says whether the ranks ended as they should; with 0 only if the last checkpoint of the run is whole."""
        return set(codes.values()) <= self.statuses | ({0} if finished else set())


@dataclass
class Moment:
    """What a strike finds."""

    ranks: Ranks
    run: Path
    rng: random.Random
    start_another: Callable[[], None]
    """Starts the run a second time."""


Strike = Callable[[Moment], Blow]


def kill_one(at: Moment) -> Blow:
    """SIGKILL to one rank; the remaining ranks must end by themselves."""
    at.ranks.kill(signal.SIGKILL, [at.rng.randrange(len(at.ranks.processes))])
    return Blow("kill one rank", frozenset({KILLED, EXIT_FAILED}))


def kill_all(at: Moment) -> Blow:
    """SIGKILL to all at once, as in a power failure."""
    at.ranks.kill(signal.SIGKILL)
    return Blow("kill all ranks", frozenset({KILLED}))


def ask_to_stop(at: Moment) -> Blow:
    """SIGUSR2 to one rank or to all: they save everything and end with 85."""
    at.ranks.kill(signal.SIGUSR2, None if at.rng.random() < 0.5 else [at.rng.randrange(len(at.ranks.processes))])
    return Blow("SIGUSR2", frozenset({EXIT_STOPPED}))


def fill_disk(at: Moment) -> Blow:
    """No room for a checkpoint: saves fail and training continues; then the machine dies."""
    with full(at.run.parent):
        return _saves_fail(at.ranks, at.run, "disk full")


def make_read_only(at: Moment) -> Blow:
    """The checkpoint folder is read-only for a while: saves fail and training continues; then the machine dies."""
    with read_only(at.run / "checkpoints"):
        return _saves_fail(at.ranks, at.run, "folder read-only")


def flip_bit(at: Moment) -> Blow:
    """All die, and one bit of the newest checkpoint flips."""

    def flip() -> None:
        file = _any_file(at.run, at.rng)
        if file is not None:
            content = bytearray(file.read_bytes())
            content[at.rng.randrange(len(content))] ^= 1 << at.rng.randrange(8)
            file.write_bytes(content)

    at.ranks.kill(signal.SIGKILL)
    return Blow("bit flipped", frozenset({KILLED}), flip)


def truncate(at: Moment) -> Blow:
    """All die, and a file of the newest checkpoint is truncated."""

    def cut() -> None:
        file = _any_file(at.run, at.rng)
        if file is not None:
            with file.open("rb+") as out:
                out.truncate(at.rng.randrange(file.stat().st_size))

    at.ranks.kill(signal.SIGKILL)
    return Blow("file truncated", frozenset({KILLED}), cut)


def supersede(at: Moment) -> Blow:
    """A second start takes the run over: the first one must end by itself. The second is killed when it has."""
    at.start_another()
    return Blow("superseded start", frozenset({EXIT_FAILED}))


def kill_agent(at: Moment) -> Blow:
    """SIGKILL to torchrun's agent, whose store is gone with it: several ranks must end by themselves."""
    at.ranks.kill_agent()
    if len(at.ranks.processes) > 1:
        return Blow("agent killed", frozenset({EXIT_FAILED}))
    at.ranks.kill(signal.SIGKILL)  # nothing is lost to a lone rank
    return Blow("agent killed", frozenset({KILLED}))


def refuse_maps(at: Moment) -> Blow:
    """The machine has refused to map shards since the start; then it dies."""
    at.ranks.kill(signal.SIGKILL)
    return Blow("mmap refused", frozenset({KILLED, EXIT_FAILED}))


def fail_storage(at: Moment) -> Blow:
    """A call in the run folder, or all from one on, has failed since the start; then the machine dies."""
    at.ranks.kill(signal.SIGKILL)
    return Blow("storage fails", frozenset({KILLED, EXIT_FAILED}))


STRIKES: dict[str, Strike] = {
    "kill one rank": kill_one,
    "kill all ranks": kill_all,
    "SIGUSR2": ask_to_stop,
    "disk full": fill_disk,
    "folder read-only": make_read_only,
    "bit flipped": flip_bit,
    "file truncated": truncate,
    "superseded start": supersede,
    "agent killed": kill_agent,
    "mmap refused": refuse_maps,
    "storage fails": fail_storage,
}

# Below the run folder, a start that is struck makes each of these calls some forty times.
_FREQUENT = frozenset(CALLS) - {"statvfs", "lock", "map", "truncate"}

DAMAGES = frozenset({"bit flipped", "file truncated"})


def name_of(strike: Strike) -> str:
    """Returns the kind that a strike's faults have."""
    return next(kind for kind, known in STRIKES.items() if known is strike)


# Strikes that begin with the start that they strike.
FROM_THE_START = (refuse_maps, fail_storage)


def plan_of(strike: Strike, run: Path, tokens: Path, rng: random.Random) -> Plan:
    """Returns what fails in a start that such a strike is for."""
    if strike is refuse_maps:
        return Plan(tokens, "mmap refused", "map", rng.randint(1, 2), rng.random() < 0.5)
    failure = rng.choice([failure for failure in FAILURES if failure != "mmap refused"])
    call = rng.choice(sorted(FAILURES[failure][1] & _FREQUENT))
    return Plan(run, failure, call, rng.randint(1, 40), rng.random() < 0.5)


class Deck:
    """Deals the strikes in random order, each once before any is repeated."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._cards: list[Strike] = []

    def draw(self) -> Strike:
        """Returns the next strike."""
        if not self._cards:
            self._cards = list(STRIKES.values())
            self._rng.shuffle(self._cards)
        return self._cards.pop()

    def put_back(self, strike: Strike) -> None:
        """Returns a strike that came too late to the deck; it is the next one."""
        self._cards.append(strike)

    def put_under(self, strike: Strike) -> None:
        """Returns a strike that met no call which it could fail to the deck; it is the last one of this round."""
        self._cards.insert(0, strike)


def _saves_fail(ranks: Ranks, run: Path, kind: str) -> Blow:
    """Waits for a failed save and two steps after it, then kills all; it is a problem if they do not come."""
    problem = None
    failed = len(experiment.events(run, "checkpoint_failed"))
    if not ranks.within(lambda: len(experiment.events(run, "checkpoint_failed")) > failed or ranks.poll(), 30):
        problem = "no failed save was reported within 30 s"
    else:
        goal = min(experiment.last_step(run) + 2, experiment.STEPS)
        ranks.within(lambda: experiment.last_step(run) >= goal or ranks.poll(), 15)
        if experiment.last_step(run) < goal:
            problem = "training stopped after a failed save"
    ranks.kill(signal.SIGKILL)
    ranks.wait(10)
    # Ranks that took the last step may have ended by themselves: a run whose last checkpoint failed is not finished.
    at_the_end = experiment.last_step(run) == experiment.STEPS
    return Blow(kind, frozenset({KILLED, EXIT_FAILED} if at_the_end else {KILLED}), problem=problem)


def _any_file(run: Path, rng: random.Random) -> Path | None:
    from pipeline.checkpoint.layout import published

    newest = published(run / "checkpoints")[:1]
    files = sorted(f for folder in newest for f in folder.iterdir())
    return rng.choice(files) if files else None
