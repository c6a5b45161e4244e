"""Failing storage: the n-th call of a kind below a folder fails, in a real process and whatever library makes the call.

with injected(plan, tmp_path / "tally") as (environ, tally):
    ranks = processes.start(arguments, 1, log, environ)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("injected.c")
LIBRARIES = Path(__file__).parents[2] / "build"

# In the order of `enum kind`.
CALLS = (
    "open", "create", "read", "write", "fsync", "rename", "close", "mkdir", "stat", "statvfs", "unlink", "list", "lock",
    "map", "truncate",
)  # fmt: skip
_CHANGES = {"create", "mkdir", "rename", "unlink"}

# What each failing storage refuses.
FAILURES: dict[str, tuple[int, frozenset[str]]] = {
    "ESTALE": (errno.ESTALE, frozenset(CALLS)),
    "EIO": (errno.EIO, frozenset(CALLS)),
    "disk full": (errno.ENOSPC, frozenset({"create", "write", "fsync", "mkdir", "rename"})),
    "no inodes": (errno.ENOSPC, frozenset({"create", "mkdir"})),
    "read-only": (errno.EROFS, frozenset(_CHANGES)),
    "mmap refused": (errno.EPERM, frozenset({"map"})),
    "quota": (errno.EDQUOT, frozenset({"create", "write", "fsync", "mkdir", "close"})),
}
_TALLY = struct.Struct(f"={len(CALLS)}qq512s")


@dataclass(frozen=True)
class Plan:
    """What fails, and when."""

    under: Path
    """The folder below which calls fail."""
    failure: str
    """One of `FAILURES`."""
    call: str
    """The kind of the first call that fails."""
    at: int
    """Its number among the calls of its kind, from 1."""
    stays: bool
    """Whether all calls that this storage refuses fail from then on, and not this one alone."""

    def __str__(self) -> str:
        return f"{self.failure} at {self.call} {self.at}{' and later' if self.stays else ''} under {self.under.name}"


@dataclass(frozen=True)
class Tally:
    """What the processes of a start have called below the folder."""

    file: Path

    def calls(self) -> dict[str, int]:
        """Returns the number of calls of each kind."""
        return dict(zip(CALLS, _TALLY.unpack(self.file.read_bytes())[: len(CALLS)], strict=True))

    def struck(self) -> int:
        """Returns how many calls failed."""
        return int(_TALLY.unpack(self.file.read_bytes())[len(CALLS)])

    def first(self) -> str:
        """Returns the path of the first call that failed."""
        return str(_TALLY.unpack(self.file.read_bytes())[-1].split(b"\0")[0].decode())


def drawn(rng: random.Random, under: Path, calls: dict[str, int]) -> Plan:
    """Returns a failure at a random one of the calls that an undisturbed start made."""
    failure = rng.choice([name for name, (_, kinds) in FAILURES.items() if any(calls[kind] for kind in kinds)])
    kinds = sorted(kind for kind in FAILURES[failure][1] if calls[kind])
    kind = rng.choice(kinds)
    return Plan(under, failure, kind, rng.randint(1, calls[kind]), rng.random() < 0.5)


@contextlib.contextmanager
def injected(plan: Plan | Path, file: Path) -> Iterator[tuple[dict[str, str], Tally]]:
    """Yields the variables of a process that the plan strikes, and what it has called.

    Args:
        plan: What fails; a folder to count the calls below it only.
        file: A new file for the tally.
    """
    file.write_bytes(bytes(_TALLY.size))
    environ = {"LD_PRELOAD": str(library()), "INJECT_TALLY": str(file)}
    if isinstance(plan, Plan):
        error, kinds = FAILURES[plan.failure]
        numbers = {
            "ERRNO": error, "KIND": CALLS.index(plan.call), "AT": plan.at, "STAYS": int(plan.stays),
            "KINDS": sum(1 << CALLS.index(kind) for kind in kinds),
        }  # fmt: skip
        environ |= {f"INJECT_{name}": str(value) for name, value in numbers.items()}
    environ["INJECT_UNDER"] = str(plan.under if isinstance(plan, Plan) else plan)
    yield environ, Tally(file)


def begin() -> None:
    """Reads the plan in the variables of a forked process."""
    if "INJECT_UNDER" in os.environ:
        ctypes.CDLL(None).inject_begin()


def library() -> Path:
    """Returns the compiled library, made on first use.

    Raises:
        FileNotFoundError: There is no C compiler.
    """
    made = LIBRARIES / f"injected-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not made.exists():
        LIBRARIES.mkdir(exist_ok=True)
        temp = made.with_name(f"{made.name}.{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(temp), str(SOURCE), "-ldl"], check=True)
        temp.replace(made)
    return made


@contextlib.contextmanager
def preloaded() -> Iterator[None]:
    """Lets the processes that start in this block be struck later, where there is a C compiler."""
    if shutil.which("cc") is None:
        yield
        return
    os.environ["LD_PRELOAD"] = str(library())
    try:
        yield
    finally:
        del os.environ["LD_PRELOAD"]
