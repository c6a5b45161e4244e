import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from pipeline.tracking.upload.uploader import Uploader
from tests.tracking.support import make_run

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


class InThread:
    """Runs the helper's work in a thread: a process that imports mlflow takes seconds to start."""

    def __init__(self, run, uri, attempt):
        self.closing = threading.Event()
        self.done = uri is None
        self.thread = threading.Thread(target=self.work, args=(run, uri), daemon=True)
        self.thread.start()

    def work(self, run, uri):
        if uri is not None:
            self.done = Uploader(run, run.config(), uri, self.closing).work()

    def close(self, timeout_s):
        self.closing.set()
        self.thread.join(timeout_s)
        return self.done and not self.thread.is_alive()


@pytest.fixture
def real_helper():
    """Enables the real helper process."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Spares tests the pauses meant for training and the processes they do not test."""
    monkeypatch.setattr("pipeline.tracking.upload.uploader._ROUND_S", 0.1)
    monkeypatch.setattr("pipeline.tracking.upload.uploader._PAUSE_S", (0.1, 0.5))
    if "real_helper" not in request.fixturenames:
        monkeypatch.setattr("pipeline.tracking.tracker.Helper", InThread)


class Killed(BaseException):
    pass


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """Returns a sqlite file with MLflow's tables (which take seconds), after a process killed while making one."""
    import sqlite3

    from mlflow.store.tracking import sqlalchemy_store

    from pipeline.tracking.upload.store import Store

    def die(uri, *_):
        with sqlite3.connect(uri.removeprefix("sqlite:///")) as db:
            db.execute("CREATE TABLE webhooks (webhook_id INTEGER)")
        raise Killed

    folder = tmp_path_factory.mktemp("store")
    arguments = (f"sqlite:///{folder}/mlflow.db", "tests", str(folder / "artifacts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlalchemy_store, "SqlAlchemyStore", die)
        with pytest.raises(Killed):
            Store(*arguments)
    left = sorted(p.name for p in folder.iterdir())
    Store(*arguments)
    return SimpleNamespace(file=folder / "mlflow.db", left_by_the_kill=left)


@pytest.fixture
def folder(tmp_path, empty_store):
    """Returns a folder for a run, with an empty store."""
    import sqlite3

    target = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store.file, target)
    with sqlite3.connect(target) as db:  # the experiment keeps the artifacts of another folder
        db.execute("UPDATE experiments SET artifact_location = ?", (f"file://{tmp_path}/artifacts/tests",))
    return tmp_path


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a run that has no store of its own."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # no power failure here
    return make_run(tmp_path, "none")[0]


@pytest.fixture
def ticks(monkeypatch):
    """Gives every line its own time."""
    clock = iter(range(1, 10**9))
    monkeypatch.setattr("pipeline.tracking.history.time.time", lambda: float(next(clock)))
