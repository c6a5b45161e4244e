import os
import shutil
import threading

import pytest

from pipeline.tracking.uploader import Uploader

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


class InThread:
    """The helper's work in a thread of the test: starting a process that imports mlflow takes seconds."""

    def __init__(self, run, uri):
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
    """For tests of the process itself."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No test waits for pauses that are there for the sake of training, nor for a process it does not test."""
    monkeypatch.setattr("pipeline.tracking.uploader._ROUND_S", 0.1)
    monkeypatch.setattr("pipeline.tracking.uploader._PAUSE_S", (0.1, 0.5))
    if "real_helper" not in request.fixturenames:
        monkeypatch.setattr("pipeline.tracking.tracker.Helper", InThread)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A sqlite file that MLflow has made its tables in: making them takes seconds."""
    from pipeline.tracking.store import Store

    folder = tmp_path_factory.mktemp("store")
    Store(f"sqlite:///{folder}/mlflow.db", "tests", str(folder / "artifacts"))
    return folder / "mlflow.db"


@pytest.fixture
def folder(tmp_path, empty_store):
    """A folder for a run, with a store that has no runs."""
    import sqlite3

    target = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store, target)
    with sqlite3.connect(target) as db:  # the experiment keeps the artifacts of another folder
        db.execute("UPDATE experiments SET artifact_location = ?", (f"file://{tmp_path}/artifacts/tests",))
    return tmp_path
