"""How far an MLflow store has been fed: `mlflow.json` in the run folder, durable and shared by processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.run.folder import Run

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Retry(BaseModel):
    """Steps whose published values were overtaken; MLflow has the new ones under keys ending in `.retryN`.

    MLflow cannot take a point back, so the first values stay where they are and never get a second one
    beside them.
    """

    number: int
    first_step: int
    last_step: int


class StoreState(BaseModel):
    """How far one store has been fed."""

    run_id: str | None = None
    """Id of the MLflow run; None before it was made."""
    sent: int = 0
    """Bytes of metrics.jsonl the store has acknowledged."""
    sending: int = 0
    """Bytes of metrics.jsonl that may have arrived: never less than `sent`."""
    system: dict[str, int] = {}
    """The same for the file of each node's system metrics."""
    files: dict[str, str] = {}
    """SHA-256 of every artifact the store has, by its name."""
    status: str | None = None
    """Status the store was told last."""


class State(BaseModel):
    """All that has to survive a kill."""

    identity: str
    """Given to the MLflow run as a tag before anything else, so that a run whose id was lost is found again."""
    generation: int = 0
    """Raised whenever metrics.jsonl is cut or a retry begins: a batch read before that is no longer valid."""
    attempt: int = 0
    """How often the run was started."""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "STOPPED"] = "RUNNING"
    """How the last process ended, RUNNING until then; STOPPED where a scheduler will start the next one."""
    ended: float | None = None
    """When it closed, in Unix seconds."""
    retries: list[Retry] = []
    """See `Retry`."""
    dataset: dict[str, Any] = {}
    """What the first start said about the data."""
    store: str | None = None
    """Address of the store that is fed by default."""
    stores: dict[str, StoreState] = {}
    """How far each store has been fed, by its address (which never holds a password)."""

    def of(self, uri: str) -> StoreState:
        """The state of one store, begun where there is none."""
        return self.stores.setdefault(uri, StoreState())

    def possibly_published(self) -> int:
        """Bytes of metrics.jsonl that some store may have."""
        return max((s.sending for s in self.stores.values()), default=0)

    def retry_number(self, step: int) -> int:
        """Which retry a step of the final history belongs to; 0 for none."""
        return max((r.number for r in self.retries if r.first_step <= step <= r.last_step), default=0)


def load(run: Run) -> State:
    """The state of a run as it is on disk.

    Raises:
        PipelineError: The file is damaged.
    """
    if run.mlflow_file.exists():
        try:
            return State.model_validate(read_json(run.mlflow_file))
        except ValidationError as error:
            raise PipelineError(
                f"{run.mlflow_file}: is not what was written there ({_first(error)}); put it back from a backup, "
                "or remove it: the run is then sent to MLflow once more, as a new run there"
            ) from error
    return State(identity=uuid.uuid4().hex)


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, found["loc"])), found["msg"]]))


def settled(run: Run) -> State:
    """The state while nobody is changing it: metrics.jsonl, as it is read afterwards, is at least as new."""
    with file_lock(run.state_lock):
        return load(run)


def update(run: Run, change: Callable[[State], None], then: Callable[[], None] | None = None) -> State:
    """Reads, changes and publishes the state under a lock that is held for milliseconds.

    Args:
        run: The run.
        change: Changes the state it is given.
        then: What must follow the publishing before anybody else goes on.
    """
    with file_lock(run.state_lock):
        state = load(run)
        change(state)
        write_json(run.mlflow_file, state.model_dump(mode="json"))
        if then is not None:
            then()
    return state


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Waits for an exclusive lock on a file; the kernel lets go of it when its holder dies.

    On a file system without locks nothing is locked: replaying points is harmless (the store keeps one of each).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(fd, wait=True)
        yield
    finally:
        os.close(fd)


def hold_alive(run: Run, attempt: int) -> int:
    """An open file whose lock says that a start of the run is alive; each has its own.

    A process on a node that was given up for lost may keep the lock of an earlier start for as long as it likes.
    """
    for older in run.tracking.glob("alive.*.lock"):
        older.unlink(missing_ok=True)
    fd = os.open(_alive_file(run, attempt), os.O_RDWR | os.O_CREAT, 0o644)
    lock(fd, wait=True)  # for the moment that somebody who looks may have it
    return fd


def holds_alive(run: Run, attempt: int) -> bool:
    """Whether a process holds the lock of that start, as far as this machine can see."""
    try:
        fd = os.open(_alive_file(run, attempt), os.O_RDONLY)  # who looks may not be allowed to write
    except FileNotFoundError:
        return False
    try:
        return not lock(fd, wait=False, shared=True)
    finally:
        os.close(fd)


def _alive_file(run: Run, attempt: int) -> Path:
    return run.tracking / f"alive.{attempt}.lock"


def lock(fd: int, *, wait: bool, shared: bool = False) -> bool:
    """Locks an open file; False where somebody else has it and `wait` is not asked for.

    NFS allows a file that is open for reading a shared lock only.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
