"""What follows an attempt whose preflight has found a bad node: the retry keeps away from it, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch import attempt, records
from pipeline.launch.site import Site
from pipeline.launch.work import Attempt, Task
from pipeline.run import Run
from pipeline.tracking import journal
from tests.launch.support import SITE, FakeSlurm, make_run

FOUND = "cuda:1 multiplies matrices wrongly: 32 of 65536 elements"


def ended_in_preflight(run: Run, **requeue: bool) -> Attempt:
    """An attempt on gpu1 and gpu2, of which gpu2 is bad; all ranks have ended with status 1."""
    site = Site.model_validate({**SITE, "requeue": requeue})
    now = Attempt("train", Task(str(run.path), ()), site, "7", "7", 0, "gpu[1-2]")
    records.note(run, "began", **now.about(), nodes=now.nodes)
    journal.append_event(run.events_file, "bad_node", nodes=["gpu2"], problems=[FOUND])
    records.note(run, "rank_failed", **now.about(), rank=0, host="gpu1", status=1)
    return now


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Run:
    made, _ = make_run(tmp_path, monkeypatch)
    monkeypatch.setattr(attempt, "_KILLED_WITHIN_S", 0.0)  # no Slurm ends this process
    slurm.says("scontrol", "JobId=7 JobState=PENDING Partition=main NumNodes=2-2 ExcNodeList=(null)\n")
    slurm.says("scontrol", "gpu1\ngpu2\n", call=1)  # the names in the host list
    slurm.says("sinfo", "gpu1 idle\ngpu2 idle\ngpu3 idle\n")
    return made


def test_the_retry_keeps_away_from_a_bad_node(run: Run, slurm: FakeSlurm):
    attempt.end(ended_in_preflight(run), 1)
    assert slurm.calls("scontrol")[1:] == [
        "requeue 7", "--oneliner show job 7", "update JobId=7 ExcNodeList=gpu2"
    ]  # fmt: skip


def test_the_reason_is_what_preflight_found_not_the_status_of_the_first_rank(run: Run):
    attempt.end(ended_in_preflight(run), 1)
    (ended,) = [note for note in records.notes(run, "train") if note["event"] == "ended"]
    assert ended["reason"] == f"bad node gpu2: {FOUND}"


def test_a_node_is_not_excluded_where_too_few_would_be_left(run: Run, slurm: FakeSlurm, capsys):
    slurm.says("sinfo", "gpu1 idle\ngpu2 idle\n", call=2)  # the nodes of the partition
    attempt.end(ended_in_preflight(run), 1)
    assert not any("update" in call for call in slurm.calls("scontrol"))
    assert "gpu2 not excluded: only 1 other nodes are left" in capsys.readouterr().err


def test_a_site_may_leave_bad_nodes_in(run: Run, slurm: FakeSlurm):
    attempt.end(ended_in_preflight(run, exclude_lost_nodes=False), 1)
    assert slurm.calls("scontrol")[-1] == "requeue 7"
