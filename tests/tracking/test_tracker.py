"""What cannot be written now is written later, and a failure at the end hides nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError
from pipeline.run import journal
from pipeline.run.events import Failed, Finished
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from tests.experiment import lines
from tests.tracking.support import begin, make_run


@contextmanager
def failing_storage() -> Iterator[None]:
    def refused(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(journal.os, "write", refused)
        patched.setattr("pipeline.tracking.upload_state.write_json", refused)
        yield


def steps(run: Run) -> list[int]:
    return [line["step"] for line in lines(run.metrics_file)]


@pytest.mark.parametrize("later", ["with the next", "at the end"])
def test_lines_and_events_that_cannot_be_written_are_written_later(tmp_path: Path, later: str) -> None:
    run, config = make_run(tmp_path, "none")
    tracker = begin(run, config)
    with failing_storage():
        tracker.log(1, {"train/loss": 3.0})
        tracker.event(Failed(step=1, error="first"))
    if later == "with the next":
        tracker.log(2, {"train/loss": 2.0})
        tracker.event(Failed(step=2, error="second"))
        assert steps(run) == [1, 2]
        assert [line.get("error") for line in lines(run.events_file)][-2:] == ["first", "second"]
    tracker.close("FAILED")
    assert steps(run)[0] == 1 and "first" in [line.get("error") for line in lines(run.events_file)]


def test_a_full_disk_does_not_end_a_run_that_rolls_back(tmp_path: Path) -> None:
    tracker = begin(*(made := make_run(tmp_path, "none")))
    for step in (1, 2, 3):
        tracker.log(step, {"train/loss": 3.0})
    with failing_storage():
        tracker.rewind(1)
        tracker.log(2, {"train/loss": 2.5})
    tracker.log(3, {"train/loss": 2.0})
    tracker.close("FINISHED")
    assert [(line["step"], line["train/loss"]) for line in lines(made[0].metrics_file)] == [
        (1, 3.0),
        (2, 2.5),
        (3, 2.0),
    ]


def test_a_failure_to_record_the_end_of_a_failed_start_does_not_replace_its_reason(tmp_path: Path) -> None:
    tracker = begin(*make_run(tmp_path, "none"))
    with failing_storage():
        tracker.close("FAILED")


def test_a_finished_run_whose_last_lines_are_lost_says_so(tmp_path: Path) -> None:
    run, config = make_run(tmp_path, "none")
    tracker = begin(run, config)
    with failing_storage():
        tracker.log(300, {"train/loss": 3.0})
        tracker.event(Finished(step=300))
        with pytest.raises(PipelineError, match="lost"):
            tracker.close("FINISHED")
    assert upload_state.load(run).status == "RUNNING"  # what the next start, or `pipeline sync`, settles


@pytest.mark.parametrize(("in_job", "most"), [(True, 2.0), (False, 30.0)])
def test_the_nodes_of_a_job_are_not_held_for_mlflow(tmp_path: Path, monkeypatch, caplog, in_job: bool, most: float):
    """The evaluation job sends what is left; by hand nobody else would."""
    waits: list[float] = []

    class Slow:
        def __init__(self, *_: object) -> None:
            pass

        def close(self, timeout_s: float) -> bool:
            waits.append(timeout_s)
            return False

    monkeypatch.setattr("pipeline.tracking.tracker.Helper", Slow)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if in_job:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    run, config = make_run(tmp_path)
    begin(run, config).close("FINISHED")
    assert waits == [most]
    assert ("the next job of the run sends the rest" in caplog.text) == in_job and "pipeline sync" in caplog.text
