"""Status names the rank that the others wait for, and the slowest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch.watch.run_status import RunStatus, Slowest
from pipeline.launch.watch.status import statuses
from pipeline.run import journal
from pipeline.run.events import Event, Failed, Finished, Hang, HangEnded, Resumed, StartBegan, append
from pipeline.run.folder import Run
from pipeline.run.related import found_runs
from tests.launch.support import FakeSlurm, make_run, pipeline


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run without jobs."""
    return make_run(tmp_path, monkeypatch)[0]


def status() -> RunStatus:
    (found,) = statuses(found_runs(["runs/tiny"])[0])
    return found


HANG = Hang(step=7, ranks=[3], hosts=["n2"], phases=["data"], waited_s=30.0, path="runs/tiny/hangs/step_00000007")


@pytest.mark.parametrize(
    ("after", "shown"),
    [([], True), ([Failed(error="silent")], True), ([HangEnded(seconds=40.0)], False), ([Resumed(step=5)], True),
     ([StartBegan(number=2)], False), ([Finished(step=9)], False)],
)  # fmt: skip
def test_the_rank_that_did_not_come_is_shown_until_the_ranks_move_or_a_new_start_begins(
    run: Run, slurm: FakeSlurm, after: list[Event], shown: bool, tmp_path: Path
):
    for event in (StartBegan(number=1), HANG, *after):
        append(run.events_file, event)
    found = status()
    assert (found.hang is not None) is shown
    text = pipeline(tmp_path, "status", "runs/tiny", slurm=slurm).out
    assert ("rank 3 on n2" in text and "data" in text) is shown


def test_the_slowest_rank_is_that_of_the_last_line(run: Run, slurm: FakeSlurm, tmp_path: Path):
    assert status().slowest is None
    line = {"step": 3, "time": 5.0, "train/loss": 2.0}
    journal.append(run.metrics_file, {**line, "ranks/slowest": 7, "ranks/slowest_s": 0.41, "ranks/median_s": 0.12})
    assert status().slowest == Slowest(rank=7, seconds=0.41, median_s=0.12)
    assert "rank 7" in pipeline(tmp_path, "status", "runs/tiny", slurm=slurm).out
    journal.append(run.metrics_file, line | {"step": 4})
    assert status().slowest is None
