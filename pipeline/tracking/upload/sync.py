"""`pipeline sync`: sends what MLflow lacks, from any machine that sees the run folder."""

from __future__ import annotations

import os
import shlex
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import tracking_uri_problem
from pipeline.errors import PackageMissing, PipelineError, UsageError
from pipeline.run.events import EventLog, StartBegan
from pipeline.run.folder import Run
from pipeline.text_format import echo
from pipeline.tracking import upload_state
from pipeline.tracking.upload import describe
from pipeline.tracking.upload.errors import in_words
from pipeline.tracking.upload.feed import Feed, lock_upload
from pipeline.tracking.upload.store import Store, resolve_uri

# How long after its last line a process counts as alive on a machine whose locks this one may not see; its sampler
# writes a line every ten seconds.
_SILENCE_S = 300.0
_LOCK_WAIT_S = 120.0


@dataclass(frozen=True)
class Synced:
    """What `sync` did."""

    uri: str | None
    """The store; None where the run has `tracking.uri: none`."""
    run_id: str | None
    """Id of the MLflow run."""
    points: int
    """Number of points sent."""
    status: str
    """Status of the MLflow run."""
    alive: bool
    """Whether a process is still training and will send more."""

    def message(self) -> str:
        """Returns one line for the user."""
        if self.uri is None:
            return "this run has tracking.uri: none; name a store with --uri to send it there"
        more = "; it is still training" if self.alive else ""
        return f"{self.uri}: {self.points} points sent, MLflow run {self.run_id} is {self.status} and complete{more}"


def sync(run: Run, uri: str | None = None) -> Synced:
    """Sends the metrics, system metrics, files and status that the store lacks.

    It is safe at any time, even during training. A run whose process ended without closing becomes KILLED; resuming
    it makes it RUNNING again.

    Args:
        run: The run.
        uri: The store; None for the one the run was recorded for, if this user's training recorded it in this folder
            or the environment names it too.

    Raises:
        UsageError: `uri` has none of the allowed forms.
        PipelineError: The store cannot be reached or refuses the run, or the run folder cannot be written. Nothing
            is lost.
    """
    target = _target(run, uri)
    try:
        alive = _note_if_killed(run)
        fd = None if target is None else _wait_for_lock(run)
    except OSError as error:
        raise PipelineError(
            f"{run.path}: cannot be written ({error.strerror}), but it must record what MLflow receives; "
            "run `pipeline sync` as a user and on a machine with write access"
        ) from error
    if target is None or fd is None:
        return Synced(None, None, 0, describe.status(run, upload_state.load(run)), alive)
    feed = Feed(run, run.config(), target)
    try:
        points = feed.send_all()
        feed.finish()
        run_id = feed.connect()[1]
    except ModuleNotFoundError as error:
        raise PackageMissing(error.name or "mlflow") from error
    except Exception as error:
        raise PipelineError(f"MLflow at {target}: {in_words(error)}") from error
    finally:
        os.close(fd)
    return Synced(target, run_id, points, describe.status(run, upload_state.load(run)), alive)


def sync_quietly(run: Run) -> None:
    """Sends what a command has just made; a failure is one line on stderr, since the result is on disk.

    A folder that no training was recorded in, such as an average, has no store.
    """
    if not run.mlflow_file.exists():
        return
    try:
        sync(run)
    except PipelineError as error:
        echo(f"pipeline: {error}", sys.stderr)


def register_export(run: Run, folder: Path, name: str) -> str:
    """Registers an exported model as a model version; returns the number of the version.

    It first stores the files as artifacts of the run: a server refuses a version at a path it cannot reach. A missing
    registered model is created.

    Raises:
        UsageError: The run has no store.
        PipelineError: The store cannot be reached or refuses the model.
    """
    from safetensors import safe_open

    synced = sync(run)
    if synced.uri is None or synced.run_id is None:
        raise UsageError(f"{run.path}: tracking.uri is none, so there is no store to register the model in")
    config = run.config()
    with safe_open(min(folder.glob("model*.safetensors")), "np") as weights:
        tags = {"pipeline.run": run.name, **describe.checkpoint_tags(run, int(weights.metadata()["step"]))}
    try:
        store = Store(synced.uri, config.tracking.experiment, config.tracking.artifact_location)
        store.send_folder(synced.run_id, folder, f"export/{folder.name}")
        return store.register(synced.run_id, name, f"export/{folder.name}", tags)
    except Exception as error:
        raise PipelineError(f"MLflow at {synced.uri}: {in_words(error)}") from error


def is_alive(run: Run, events: EventLog) -> bool:
    """Returns whether some process still trains this run, as far as this machine can see."""
    s = upload_state.load(run)
    if upload_state.holds_alive(run, s.attempt):
        return True
    if s.status != "RUNNING" or not s.attempt:
        return False
    start = events.last(StartBegan)
    return (start is None or start.host != socket.gethostname()) and time.time() - last_sign(run) < _SILENCE_S


def _note_if_killed(run: Run) -> bool:
    """Records whether a process ended without closing; returns whether one is alive."""
    alive = is_alive(run, EventLog.load(run.events_file))
    before = upload_state.load(run)
    if not alive and before.status == "RUNNING" and before.attempt:
        note_killed(run, before.attempt)
    return alive


def note_killed(run: Run, attempt: int) -> None:
    """Records that a process ended without closing, unless the run has restarted meanwhile."""

    def settle(s: upload_state.State) -> None:
        if s.status == "RUNNING" and s.attempt == attempt:
            s.status, s.ended = "KILLED", round(last_sign(run), 3)

    upload_state.update(run, settle)


def last_sign(run: Run) -> float:
    """Returns when the files of the run last changed."""
    files = [run.metrics_file, run.events_file, *run.system_metrics.glob("*.jsonl")]
    return max((f.stat().st_mtime for f in files if f.exists()), default=0.0)


def _target(run: Run, uri: str | None) -> str | None:
    if uri is not None:
        if uri == "none":
            raise UsageError("--uri none does not name a store")
        problem = tracking_uri_problem(uri)
        if problem is not None:
            raise UsageError(f"--uri {problem}")
        return resolve_uri(uri)
    state = upload_state.load(run)
    address = state.store or run.config().tracking.uri
    if address == "none":
        return None
    problem = tracking_uri_problem(address)
    if problem is not None:
        raise PipelineError(f"{run.mlflow_file}: the store {problem}")
    found = resolve_uri(address)
    if upload_state.was_recorded_here(run, state) or found == _of_environment():
        return found
    # Whoever sent the folder would get this user's credentials, or have any file of this user written to.
    raise PipelineError(
        f"{run.path}: names the store {found}, but was not trained in this folder by this user; nothing was sent. If "
        f"the store is yours: pipeline sync {shlex.quote(str(run.path))} --uri {shlex.quote(found)}"
    )


def _of_environment() -> str | None:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "none")
    return None if uri == "none" or tracking_uri_problem(uri) is not None else resolve_uri(uri)


def _wait_for_lock(run: Run) -> int:
    until = time.monotonic() + _LOCK_WAIT_S
    while True:
        fd = lock_upload(run)
        if fd is not None:
            return fd
        if time.monotonic() > until:
            raise PipelineError(
                f"{run.path}: another process has been sending this run for {_LOCK_WAIT_S:.0f} s; try again later"
            )
        time.sleep(0.2)
