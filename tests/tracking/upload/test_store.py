"""A store that fails is one message at once, and its artifacts stay in their folder."""

from __future__ import annotations

import sqlite3
import time

import pytest

from pipeline.errors import PipelineError
from pipeline.tracking.upload.sync import sync
from tests.tracking.support import begin, make_run


def test_a_store_that_cannot_be_opened_is_one_message_at_once(folder):
    run, _ = make_run(folder)
    began = time.monotonic()
    with pytest.raises(PipelineError, match=rf"{folder}: Is a directory"):
        sync(run, f"sqlite:///{folder}")
    assert time.monotonic() - began < 20, "MLflow itself tries for two minutes"


def test_a_damaged_store_is_one_message_without_a_stack(folder, capfd):
    run, config = make_run(folder)
    begin(run, config).close("FINISHED")
    with sqlite3.connect(folder / "mlflow.db") as database:
        database.execute("ALTER TABLE experiments RENAME TO gone")
    with pytest.raises(PipelineError, match="no such table: experiments"):
        sync(run)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(("experiment", "inside"), [("../../x", "..%2F..%2Fx"), ("..", "%2E%2E"), ("/abs", "%2Fabs")])
def test_the_artifacts_of_an_experiment_stay_in_their_folder_whatever_its_name(folder, experiment, inside):
    run, config = make_run(folder, None, f"tracking.experiment={experiment}")
    begin(run, config).close("FINISHED")
    assert [path.name for path in (folder / "artifacts").iterdir()] == [inside]
    assert list((folder / "artifacts" / inside).rglob("config.yaml"))
