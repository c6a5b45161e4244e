"""What sacct says a job cost, as plain values."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from pipeline.launch.job import attempt, charges
from pipeline.launch.job.spec import Attempt, Task
from pipeline.launch.site import Site
from pipeline.launch.slurm import accounting, job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run import attempts
from pipeline.run.attempts import AttemptBegan, Charged
from tests.launch.support import SITE, FakeSlurm, make_run

START = "2026-11-28T10:00:00"
BEGAN = datetime.fromisoformat(START).timestamp()


@pytest.mark.parametrize(
    ("resources", "energy", "gpus", "cpus", "joules"),
    [
        ("billing=8,cpu=96,energy=5,gres/gpu=8,gres/gpu:h200=8,mem=4G,node=2", "123456", 8, 96, 123456.0),
        ("cpu=96,gres/gpu:a100=4,gres/gpu:h200=8", "0", 12, 96, None),
        ("cpu=4,node=1", "", 0, 4, None),
        ("cpu=4,node=1", "18446744073709551614", 0, 4, None),
    ],
)
def test_a_line_of_sacct(slurm: FakeSlurm, resources: str, energy: str, gpus: int, cpus: int, joules: float | None):
    slurm.says("sacct", f"7|{START}|61|{resources}|{energy}|a|b\n")
    ((name, row),) = accounting.charges(["7"])
    assert row == Charged(job="7", began=BEGAN, seconds=61, gpus=gpus, cpus=cpus, energy_j=joules) and name == "a|b"
    assert "--duplicates" in slurm.calls("sacct")[0], "every attempt of a requeued job"


def test_a_job_that_never_ran_costs_nothing(slurm: FakeSlurm):
    slurm.says("sacct", "7|Unknown|0|||a\n8|None|0||0|a\n9_[0-3]|Unknown|0|||a\nwarning\n\n")
    assert accounting.charges(["7", "8", "9"]) == []


def evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """The first attempt of a run's evaluation, whose other jobs are 5 and 6, and an array that it shares."""
    run, _ = make_run(tmp_path, monkeypatch)
    stages: list[tuple[str, attempts.Stage]] = [("5", "prepare"), ("6", "train"), ("7", "evaluate")]
    jobs = [Job(job, stage, 1, 5.0, "here", True, name=f"tiny-{stage}") for job, stage in stages]
    job_records.add_jobs(run, [*jobs, Job("4", "prepare", 9, 5.0, "here", True, shared=True)])
    return Attempt("evaluate", Task(str(run.path), ()), Site.model_validate(SITE), "7", "7", 0, "n1")


def test_the_evaluation_records_what_the_jobs_before_it_cost(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    now = evaluation(tmp_path, monkeypatch)
    monkeypatch.setattr(charges, "_PAUSE_S", 0)  # nothing will be known of job 5
    row = f"{START}|61|cpu=96,gres/gpu=8|500"
    slurm.says("sacct", f"6|{row}|tiny-train\n5|{row}|of-another-cluster\n")
    assert attempt.begin(now) is not None and attempt.begin(now) is not None
    assert "5,6" in slurm.calls("sacct")[0]
    (row,) = attempts.every(now.run).of(Charged)
    assert (row.job, row.seconds, row.gpus, row.energy_j) == ("6", 61, 8, 500)
    assert attempts.every(now.run).of(AttemptBegan)[0].cpus == 1


def test_the_evaluation_waits_until_accounting_has_heard_of_the_jobs_before_it(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    now = evaluation(tmp_path, monkeypatch)
    row = f"{START}|61|cpu=96|0"
    slurm.says("sacct", f"5|{row}|tiny-prepare\n")
    late = f"5|{row}|tiny-prepare\n6|{row}|tiny-train\n"
    monkeypatch.setattr(charges.time, "sleep", lambda seconds: slurm.says("sacct", late))
    assert attempt.begin(now) is not None
    assert [row.job for row in attempts.every(now.run).of(Charged)] == ["5", "6"]
    assert len(slurm.calls("sacct")) == 2


def test_accounting_that_does_not_answer_does_not_keep_the_evaluation_from_starting(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    now = evaluation(tmp_path, monkeypatch)
    slurm.says("sacct", err="sacct: error: slurmdbd is away\n", status=1)
    assert attempt.begin(now) is not None
    assert "slurmdbd is away" in capsys.readouterr().err
