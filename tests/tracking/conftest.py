import os
import shutil

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(autouse=True)
def one_round_after_another(monkeypatch):
    """No test waits for the pauses that are there for the sake of training."""
    monkeypatch.setattr("pipeline.tracking.uploader._ROUND_S", 0.1)
    monkeypatch.setattr("pipeline.tracking.uploader._PAUSE_S", (0.1, 0.5))


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
