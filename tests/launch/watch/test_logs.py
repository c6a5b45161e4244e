"""What `pipeline logs` shows: all attempts in order, and who else has said why."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.watch import logs
from pipeline.run import attempts
from pipeline.run.attempts import AttemptBegan, AttemptEnded
from pipeline.run.events import NodeLost, append
from pipeline.run.folder import Run
from tests.launch.support import make_run

NO_MODULE = "/var/spool/slurmd/job00102/slurm_script: line 21: module: command not found"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with an array of two and a job of two ranks, of which nothing has been printed."""
    made, _ = make_run(tmp_path, monkeypatch)
    job_records.add_jobs(made, [Job("101", "prepare", 2, 5.0, "here", True), Job("102", "train", 1, 5.0, "here", True)])
    return made


def rank_log(run: Run, job: str, name: str, text: str) -> None:
    (run.logs / job).mkdir(parents=True, exist_ok=True)
    (run.logs / job / name).write_text(text)


def test_attempts_and_tasks_are_shown_in_order_with_slurms_words_after_each_job(run: Run):
    rank_log(run, "101_1", "attempt_0_rank_0.log", "slice two\n")
    rank_log(run, "101_0", "attempt_0_rank_0.log", "slice one\n")
    for number in (10, 2):
        rank_log(run, "102", f"attempt_{number}_rank_0.log", f"attempt {number}\n")
    rank_log(run, "102", "attempt_2_rank_1.log", "of the other rank\n")
    (run.launch / "102_0_log.err").write_text("submitit INFO chatter\nslurmstepd: error: *** CANCELLED\n")
    assert "".join(logs.printed(run)) == (
        "==> prepare, job 101_0, attempt 0, rank 0 <==\nslice one\n"
        "==> prepare, job 101_1, attempt 0, rank 0 <==\nslice two\n"
        "==> train, job 102, attempt 2, rank 0 <==\nattempt 2\n"
        "==> train, job 102, attempt 10, rank 0 <==\nattempt 10\n"
        "==> Slurm and the batch script, job 102 <==\nslurmstepd: error: *** CANCELLED\n"
    )


def test_ranks_that_share_the_log_of_their_node_are_found_in_it(run: Run):
    for first in (0, 8, 64):
        rank_log(run, "102", f"attempt_0_rank_{first}.log", f"from {first} on\n")
    for rank, shown in ((7, "from 0 on"), (8, "from 8 on"), (71, "from 64 on")):
        assert f"{shown}\n" in "".join(logs.printed(run, rank))
    with pytest.raises(UsageError, match="ranks with output: 0, 8, 64"):
        list(logs.printed(run, 72))


@pytest.mark.parametrize("read", [logs.printed, lambda run: logs.follow(run, 0, lambda: True)])
def test_an_attempt_says_why_it_began(run: Run, read):
    for number in range(4):
        rank_log(run, "102", f"attempt_{number}_rank_0.log", f"attempt {number}\n")
    about = {"stage": "train", "job": "102"}
    attempts.note(run, AttemptBegan(**about, attempt=0, nodes="n[1-2]", time=10.0))
    append(run.events_file, NodeLost(job="102", nodes=["n2"], time=20.0))
    attempts.note(run, AttemptBegan(**about, attempt=1, nodes="n[1,3]", time=20.0))
    attempts.note(run, AttemptEnded(**about, attempt=1, outcome="stopped", reason="asked to stop"))
    attempts.note(run, AttemptBegan(**about, attempt=2, nodes="n[1,3]", time=30.0))
    attempts.note(run, AttemptBegan(**about, attempt=3, nodes="n[1,3]", time=40.0))
    titles = [line for line in "".join(read(run)).splitlines() if line.startswith("==>")]
    assert titles == [
        "==> train, job 102, attempt 0, rank 0 <==",
        "==> train, job 102, attempt 1, rank 0; it began because n2 was lost <==",
        "==> train, job 102, attempt 2, rank 0; it began because attempt 1 ended: asked to stop <==",
        "==> train, job 102, attempt 3, rank 0; it began because attempt 2 left no record of its end, as when "
        "Slurm requeues a job by itself <==",
    ]


@pytest.mark.parametrize("read", [logs.printed, lambda run: logs.follow(run, 0, lambda: True)])
def test_a_job_that_never_started_shows_why(run: Run, read):
    (run.launch / "102_0_log.err").write_text(f"{NO_MODULE}\n")
    (run.launch / "101_1_0_log.err").write_text("slurmstepd: error: execve(): No such file or directory\n")
    assert "".join(read(run)) == (
        "==> Slurm and the batch script, job 101_1 <==\nslurmstepd: error: execve(): No such file or directory\n"
        f"==> Slurm and the batch script, job 102 <==\n{NO_MODULE}\n"
    )


def test_what_only_one_rank_s_launcher_said_is_shown_with_that_rank(run: Run):
    (run.launch / "102_1_log.err").write_text("pipeline: error: container.image: pipeline.sif cannot be read\n")
    assert "".join(logs.printed(run, 1)) == (
        "==> the launcher of rank 1, job 102 <==\npipeline: error: container.image: pipeline.sif cannot be read\n"
    )
    with pytest.raises(UsageError, match="no job"):
        list(logs.printed(run, 0))


def test_a_run_of_a_sweep_finds_its_words_in_the_sweeps_folder(run: Run):
    job_records.add_jobs(run, [Job("105_1", "train", 1, 6.0, "here", True)])
    home = run.path.parent / "tiny-sweep" / "launch"
    home.mkdir(parents=True)
    (home / "105_1_0_log.err").write_text(f"{NO_MODULE}\n")
    assert "".join(logs.printed(run)) == f"==> Slurm and the batch script, job 105_1 <==\n{NO_MODULE}\n"
