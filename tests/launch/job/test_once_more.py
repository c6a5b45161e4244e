"""After a failure the tasks start again where they are: a requeued job waits, and others may take its nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import EXIT_OK, EXIT_STOPPED
from pipeline.launch.job import attempt
from pipeline.launch.job.batch_script import executor
from pipeline.launch.job.causes import slurm_log
from pipeline.launch.job.spec import Attempt, JobSpec, Task
from pipeline.launch.site import Site
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded
from pipeline.run.events import BadNode, EventLog, Requeued, Restarted, append
from pipeline.run.folder import Run, step_name
from pipeline.run.world import DEADLINE_VARIABLE
from tests.launch.job.test_attempt import began, nodes, rank_ended
from tests.launch.job.test_attempt import run as run
from tests.launch.support import SITE, FakeSlurm

HELD = "JobId=7 JobState=RUNNING Restarts=0 Partition=main NumNodes=2-2 ExcNodeList=(null)\n"


@pytest.fixture(autouse=True)
def held(run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job runs on its nodes, and its time limit is far."""
    slurm.says("scontrol", HELD)
    monkeypatch.setenv(DEADLINE_VARIABLE, str(time.time() + 1200))


def requeued(run: Run) -> int:
    return len(EventLog.load(run.events_file).of(Requeued))


def test_a_failure_is_repeated_on_the_same_nodes(run: Run, slurm: FakeSlurm):
    assert attempt.end(rank_ended(began(run), 137), 137) is None
    (event,) = EventLog.load(run.events_file).of(Restarted, Requeued)
    assert isinstance(event, Restarted) and event.reason == "rank 1 on gpu2 was killed by signal 9"
    assert not any(call.startswith(("requeue", "update")) for call in slurm.calls("scontrol"))


def test_a_second_failure_without_progress_goes_through_the_queue(run: Run, slurm: FakeSlurm):
    ends = []
    for number in range(4):
        slurm.says("scontrol", "gpu1\ngpu2\n", call=len(slurm.calls("scontrol")) + 1)
        if number == 2:
            (run.checkpoints / step_name(5)).mkdir()
            (run.checkpoints / step_name(5) / "manifest.json").write_text("{}")
        ends.append(attempt.end(rank_ended(began(run, number), 1), 1))
    assert ends == [None, 1, None, 1]
    assert slurm.calls("scontrol").count("requeue 7") == 2


def lost(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="down*"), call=1)


def bad(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    append(run.events_file, BadNode(nodes=["gpu2"], problems=["slow"]))


def out_of_memory(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    with slurm_log(now).open("a") as log:
        log.write("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")


def taken_away(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    slurm.says("scontrol", HELD.replace("RUNNING", "COMPLETING"))


def requeued_by_slurm(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    """This script is still alive on a node that the controller gave up."""
    slurm.says("scontrol", HELD.replace("Restarts=0", "Restarts=1"))


def unknown(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    slurm.says("scontrol", status=1, call=2)


def nearly_over(run: Run, slurm: FakeSlurm, now: Attempt) -> None:
    os.environ[DEADLINE_VARIABLE] = str(time.time() + 590)


@pytest.mark.parametrize(
    "what", [lost, bad, out_of_memory, taken_away, requeued_by_slurm, unknown, nearly_over], ids=lambda f: f.__name__
)
def test_a_job_that_cannot_do_better_on_its_nodes_is_requeued(
    run: Run, slurm: FakeSlurm, what: Callable[[Run, FakeSlurm, Attempt], None]
):
    now = rank_ended(began(run), 1)
    what(run, slurm, now)
    assert attempt.end(now, 1) == 1
    assert "requeue 7" in slurm.calls("scontrol") and requeued(run) == 1


def test_who_is_asked_to_stop_leaves_the_nodes(run: Run, slurm: FakeSlurm):
    assert attempt.end(began(run), EXIT_STOPPED) == EXIT_STOPPED
    assert "requeue 7" in slurm.calls("scontrol") and requeued(run) == 1


def test_what_cannot_be_recorded_is_not_repeated_without_end(
    run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    now = rank_ended(began(run), 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "append", full)
    assert attempt.end(now, 1) == 1
    assert "requeue 7" in slurm.calls("scontrol")


def test_attempts_are_counted_over_starts_and_requeues(run: Run, monkeypatch: pytest.MonkeyPatch):
    """A job that submits another one leaves its own number in that one's environment."""
    monkeypatch.setenv("PIPELINE_ATTEMPT", "9")
    first = Attempt("train", Task(str(run.path), ()), Site.model_validate(SITE), "7", "7", 9, "gpu[1-2]")
    for allocation in (0, 0, 1, 1, 5):
        lines = attempt.begin(replace(first, allocation=allocation)) or ""
        number = int(lines.splitlines()[0].removeprefix("export PIPELINE_ATTEMPT="))
        attempts.note(run, AttemptEnded(**replace(first, number=number).about(), outcome="failed"))
    notes = attempts.notes(run, "train").of(AttemptBegan)
    assert [(note.attempt, note.allocation) for note in notes] == [(0, 0), (1, 0), (2, 1), (3, 1), (5, 5)]


def test_the_batch_script_runs_the_tasks_once_more(run: Run, slurm: FakeSlurm, tmp_path: Path):
    site = Site.model_validate(SITE)
    task = Task(str(run.path.absolute()), (("train", str(run.config_file.absolute())),))
    job = JobSpec("tiny", "train", (task,), site, site.train, 1, 60, run.code, run.launch.absolute())
    job.save()
    slurm.says("scontrol", "gpu1\ngpu2\n", call=2)  # 1 and 4: the time limit; 3: whether it holds its nodes
    slurm.says("srun", err="srun: error: gpu2: task 1: Segmentation fault\n", status=139, call=1)
    srun = slurm.folder / "srun"
    srun.write_text(srun.read_text().replace("n=$((", "grep SigIgn /proc/$$/status >> ignored\nn=$((", 1))
    script = tmp_path / "slurm_script"
    script.write_text(executor(job, None).text(1))
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-2]"}
    environment.pop(DEADLINE_VARIABLE)
    with subprocess.Popen(["bash", script], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as bash:
        _, err = bash.communicate(timeout=60)
    assert (bash.returncode, len(slurm.calls("srun"))) == (EXIT_OK, 2), err
    ends = attempts.notes(run, "train").of(AttemptEnded)
    assert [(end.attempt, end.outcome) for end in ends] == [(0, "failed"), (1, "done")]
    ignored = [int(line.split()[1], 16) for line in (slurm.folder / "ignored").read_text().splitlines()]
    assert len(ignored) == 2 and not any(mask & 1 << (signal.SIGTERM - 1) for mask in ignored), "srun would not stop"
