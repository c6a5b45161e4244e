"""How the ranks of one start find each other: through a file of the run folder that only their user can read.

Rank 0 listens at a port that the kernel chooses and writes it into the file, together with a secret drawn for this
start. The file is removed as soon as all ranks have come; one that a killed start left behind leads nowhere and is
replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.errors import STORAGE_FAILS, PipelineError, StopRequested, UsageError
from pipeline.files import naming, open_regular
from pipeline.run.private import write_private
from pipeline.run.world import World
from pipeline.train.ranks.store import HostedStore, RemoteStore, SharedStore, joined

_LOOK_S = 0.02
_SELDOM_S = 0.5
_NO_ANSWER_S = 30.0  # storage that fails this long is not waited for
_LARGEST = 4096
_MET = "met"


def meet(world: World, file: Path, timeout: timedelta, stopped: Callable[[], str | None]) -> SharedStore:
    """Returns the store of all ranks once they have all come.

    Args:
        world: This process's place.
        file: Where rank 0 writes how to reach it; on every node the same file.
        timeout: How long the ranks wait for each other here, and later in the store.
        stopped: Returns the signal that asks this process to stop, or None.

    Raises:
        StopRequested: The process is to stop.
        PipelineError: A rank did not come in time, or the file can be neither written nor kept secret.
        UsageError: The port that the environment names is taken.
    """
    until = time.monotonic() + timeout.total_seconds()
    return (_host if world.is_first else _join)(world, file, timeout, _Patience(until, stopped))


class _Patience:
    """How long to wait."""

    def __init__(self, until: float, stopped: Callable[[], str | None]) -> None:
        self._until = until
        self._stopped = stopped

    def left(self) -> bool:
        """Whether there is time left.

        Raises:
            StopRequested: The process is to stop.
        """
        reason = self._stopped()
        if reason is not None:
            raise StopRequested(f"stopped by {reason} before all ranks had met; nothing was trained")
        return time.monotonic() < self._until


def _host(world: World, file: Path, timeout: timedelta, patience: _Patience) -> SharedStore:
    secret = secrets.token_bytes(32)
    cure = "leave MASTER_PORT unset, and the system chooses a free one"
    with naming(f"MASTER_PORT={world.master_port}", "rank 0 cannot listen there", cure, UsageError):
        store = HostedStore(world.master_port, secret, world.size, timeout)
    try:
        # Under torchrun MASTER_ADDR may be another node than that of rank 0.
        hosts = list(dict.fromkeys([world.master_addr, socket.gethostname()]))
        with _published(file, {"hosts": hosts, "port": store.port, "secret": secret.hex()}):
            _until_all_have_come(store, world, patience, timeout)
        # Only now: a rank that has left one start cannot find its file when it joins the next.
        store.set(_MET, "")
    except BaseException:
        store.close()
        raise
    return store


def _until_all_have_come(store: SharedStore, world: World, patience: _Patience, timeout: timedelta) -> None:
    for rank in range(1, world.size):
        while not _came(store, joined(rank)):
            if not patience.left():
                missing = [str(r) for r in range(1, world.size) if not store.check([joined(r)])]
                raise PipelineError(
                    f"rank {', '.join(missing)} did not reach rank 0 within {timeout.total_seconds():.0f} s: if their "
                    "output shows no error, a firewall between the nodes must let the processes reach each other at "
                    "any port (MASTER_PORT names one), and `runs_dir` must be on storage that all nodes share"
                )


def _join(world: World, file: Path, timeout: timedelta, patience: _Patience) -> SharedStore:
    pause = _LOOK_S
    why = "rank 0 has not written it"
    answered = time.monotonic()
    while patience.left():
        try:
            found = _read(file)
            store = _reach(found, world, timeout)
        except OSError as error:
            if error.errno not in STORAGE_FAILS or error.filename is None:
                answered = time.monotonic()
            elif time.monotonic() - answered > _NO_ANSWER_S:
                raise PipelineError(
                    f"{file}: could not be read for {_NO_ANSWER_S:.0f} s ({error.strerror}), so that rank {world.rank} "
                    "does not find rank 0; start again when the storage answers"
                ) from error
            why = str(error)
            time.sleep(pause)
            pause = min(1.2 * pause, _SELDOM_S)
            continue
        try:
            while not _came(store, _MET):
                if not patience.left():
                    raise PipelineError(
                        f"not all of {world.size} ranks came within {timeout.total_seconds():.0f} s; the output of "
                        "rank 0 names those that are missing"
                    )
        except BaseException:
            store.close()
            raise
        return store
    raise PipelineError(
        f"{file}: rank {world.rank} could not reach rank 0 through this file within {timeout.total_seconds():.0f} s "
        f"({why}): see the output of rank 0; `runs_dir` must be on storage that all nodes share, and a firewall "
        "between them must let the processes reach each other at any port"
    )


def _came(store: SharedStore, key: str) -> bool:
    """Waits a moment for a value, between two looks at whether this process is to stop."""
    with contextlib.suppress(RuntimeError):
        store.wait([key], timedelta(seconds=_SELDOM_S))
    return store.check([key])


@contextlib.contextmanager
def _published(file: Path, content: dict[str, Any]) -> Iterator[None]:
    """Writes the file, readable by this user alone, and removes it at the end, with the folders that it needed."""
    made = [folder for folder in file.parents if not folder.exists()]
    with naming(file, "cannot be written", "choose another `runs_dir`"):
        write_private(file, json.dumps(content).encode())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
            for folder in made:  # a start that ends here leaves nothing
                folder.rmdir()


def _read(file: Path) -> dict[str, Any]:
    """Returns what rank 0 has written.

    Raises:
        OSError: There is nothing yet.
        UsageError: Others can read or change it.
    """
    # Opening the folder makes NFS ask the server; otherwise it would answer from its memory that there is no file.
    os.listdir(file.parent)  # noqa: PTH208
    with open_regular(file) as source:
        about = os.fstat(source.fileno())
        if about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise UsageError(
                f"{file}: holds the secret of this start, and other users can read or write it; choose a `runs_dir` on "
                "storage that keeps the modes of files"
            )
        content: dict[str, Any] = json.loads(source.read(_LARGEST))
    return content


def _reach(found: dict[str, Any], world: World, timeout: timedelta) -> SharedStore:
    """Connects to rank 0 at the first of its addresses that answers.

    Raises:
        OSError: None does, or what answers does not know the secret.
    """
    last = OSError("it names no address")
    for host in found["hosts"]:
        try:
            return RemoteStore(host, found["port"], bytes.fromhex(found["secret"]), world.rank, timeout)
        except OSError as error:
            last = error
    raise last
