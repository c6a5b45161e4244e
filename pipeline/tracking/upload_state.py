"""Records in `mlflow.json` of the run folder how far each MLflow store has been fed; processes share it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from pipeline.config.messages.values import first_problem
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.run.folder import Run

_Count = Annotated[int, Field(ge=0, le=1 << 53)]
_Moment = Annotated[float, Field(ge=0, lt=1e11)]
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Retry(BaseModel):
    """Steps whose published values were superseded; MLflow has the new ones under keys ending in `.retryN`.

    MLflow cannot remove a point, so the first values stay, and no second value joins them under their keys.
    """

    number: _Count
    first_step: _Count
    last_step: _Count


class StoreState(BaseModel):
    """How far one store has been fed."""

    run_id: str | None = None
    """Id of the MLflow run; None before it exists."""
    sent: _Count = 0
    """Bytes of metrics.jsonl the store has acknowledged."""
    sending: _Count = 0
    """Bytes of metrics.jsonl that may have arrived; never less than `sent`."""
    system: dict[str, _Count] = {}
    """Bytes acknowledged of the system metrics file of each node."""
    files: dict[str, str] = {}
    """SHA-256 of every artifact the store has, by its name."""
    status: str | None = None
    """The status last sent to the store."""


class State(BaseModel):
    """Everything that must survive a kill."""

    identity: str
    """A tag that the MLflow run gets first, so that a run whose id was lost can be found again."""
    folder: str | None = None
    """Where the run folder was when this was written; None in files of earlier versions."""
    copied_from: str | None = None
    """The folder, and where known the MLflow run, that this run is a copy of; None for an original."""
    generation: _Count = 0
    """Raised when metrics.jsonl is cut or a retry begins; it invalidates batches read before."""
    attempt: _Count = 0
    """Number of starts of the run."""
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "STOPPED"] = "RUNNING"
    """How the last process ended; RUNNING until then, STOPPED where a scheduler will start the next one."""
    ended: _Moment | None = None
    """When it ended, in Unix seconds."""
    retries: list[Retry] = []
    """See `Retry`."""
    dataset: dict[str, Any] = {}
    """What the first start said about the data."""
    store: str | None = None
    """Address of the store fed by default."""
    place: str | None = None
    """Where `store` was recorded; see `place_of`."""
    stores: dict[str, StoreState] = {}
    """How far each store has been fed, by its address, which never contains a password."""

    def of(self, uri: str) -> StoreState:
        """Returns the state of one store; adds an empty one where there is none."""
        return self.stores.setdefault(uri, StoreState())

    def possibly_published(self) -> int:
        """Returns the bytes of metrics.jsonl that some store may have."""
        return max((s.sending for s in self.stores.values()), default=0)

    def retry_number(self, step: int) -> int:
        """Returns the number of the retry that a step of the final history belongs to; 0 for none."""
        return max((r.number for r in self.retries if r.first_step <= step <= r.last_step), default=0)


def load(run: Run) -> State:
    """Reads the state of a run from disk.

    Raises:
        PipelineError: The file is damaged.
    """
    if run.mlflow_file.exists():
        try:
            return State.model_validate(read_json(run.mlflow_file, run.path))
        except ValidationError as error:
            raise PipelineError(
                f"{run.mlflow_file}: is damaged ({first_problem(error)}); restore it from a backup, or remove it: "
                "the run is then sent to MLflow again, as a new MLflow run"
            ) from error
    return State(identity=uuid.uuid4().hex)


def place_of(run: Run) -> str:
    """Returns a name of this very folder, which no copy of it and no archive can have.

    The kernel sets the change time of the lock file, which nothing writes to, when it makes the file.
    """
    found = run.state_lock.stat()
    return f"{found.st_ino}-{found.st_ctime_ns}"


def was_recorded_here(run: Run, state: State) -> bool:
    """Whether this user's own training recorded the store of a run in this folder, and not whoever sent the folder."""
    try:
        owned = run.path.stat().st_uid == run.state_lock.stat().st_uid == os.geteuid()
        return owned and state.place == place_of(run)
    except OSError:
        return False


def settled(run: Run) -> State:
    """Reads the state while no process changes it, so that metrics.jsonl read afterwards is at least as new."""
    with file_lock(run.state_lock):
        return load(run)


def update(run: Run, change: Callable[[State], None], then: Callable[[], None] | None = None) -> State:
    """Changes the state on disk under a lock held for milliseconds; returns the new state.

    `then` runs after the state is published and before the lock is released.
    """
    with file_lock(run.state_lock):
        state = load(run)
        _settle_origin(run, state)
        change(state)
        write_json(run.mlflow_file, state.model_dump(mode="json"))
        if then is not None:
            then()
    return state


def _settle_origin(run: Run, state: State) -> None:
    """Gives a copied run an identity of its own; a run folder that was moved keeps its own.

    Of a copy the original is still where the state says, with the same identity. An inode would not do: it changes
    when a folder is moved to another file system.
    """
    here = str(run.path.resolve())
    before, state.folder = state.folder, here
    if before is None or before == here or not _holds(Path(before), state.identity, other_than=run.path):
        return
    known = [store.run_id for store in state.stores.values() if store.run_id is not None]
    state.copied_from = f"{before} (MLflow run {', '.join(known)})" if known else before
    state.identity, state.stores = uuid.uuid4().hex, {}


def _holds(folder: Path, identity: str, *, other_than: Path) -> bool:
    """Whether there is another run folder with this identity."""
    try:
        return not folder.samefile(other_than) and load(Run(folder)).identity == identity
    except (OSError, PipelineError):
        return False


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file, after waiting for it; the kernel releases it when the holder dies.

    A file system without locks locks nothing: sending points twice is harmless, as the store keeps one of each.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    try:
        lock(fd, wait=True)
        yield
    finally:
        os.close(fd)


def hold_alive(run: Run, attempt: int) -> int:
    """Returns an open file whose lock says that this start of the run is alive.

    Each start has its own file: a process on a node given up as lost may keep the lock of an earlier start.
    """
    for older in run.tracking.glob("alive.*.lock"):
        older.unlink(missing_ok=True)
    fd = os.open(_alive_file(run, attempt), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    lock(fd, wait=True)  # `holds_alive` may have it for a moment
    return fd


def holds_alive(run: Run, attempt: int) -> bool:
    """Returns whether a process holds the lock of that start, as far as this machine can see."""
    try:
        fd = os.open(
            _alive_file(run, attempt), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        )  # the reader may lack write permission
    except FileNotFoundError:
        return False
    try:
        return not lock(fd, wait=False, shared=True)
    finally:
        os.close(fd)


def _alive_file(run: Run, attempt: int) -> Path:
    return run.tracking / f"alive.{attempt}.lock"


def lock(fd: int, *, wait: bool, shared: bool = False) -> bool:
    """Locks an open file; returns False without `wait` where another process holds the lock.

    On NFS a file opened for reading can only take a shared lock.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
