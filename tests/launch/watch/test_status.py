"""`pipeline status` from squeue, sacct and the run folder; each of Slurm's parts may be away."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.checkpoint.pins import pin
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.watch.run_status import RunStatus
from pipeline.launch.watch.status import statuses
from pipeline.launch.watch.status_view import view
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, Stage
from pipeline.run.events import (
    Finished,
    GaveUp,
    Requeued,
    Resumed,
    Submitted,
    append,
)
from pipeline.run.folder import Run
from pipeline.run.related import found_runs
from tests.launch.support import ROOT, FakeSlurm, branched, make_run, pipeline

WAITING = "102|PENDING|Dependency|||tiny-train\n103|PENDING|Dependency|||tiny-evaluate\n"
GONE = "slurm_load_jobs error: Invalid job id specified\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose chain 101, 102, 103 was submitted."""
    made, _ = make_run(tmp_path, monkeypatch)
    remember(made, accounting=True)
    return made


def remember(run: Run, *, accounting: bool) -> None:
    stages: tuple[Stage, ...] = ("prepare", "train", "evaluate")
    jobs = [Job(str(101 + i), stage, 1, 5.0, "here", accounting) for i, stage in enumerate(stages)]
    job_records.forget_jobs(run, {job.id for job in jobs})
    job_records.add_jobs(run, jobs)
    append(run.events_file, Submitted(jobs=[job.id for job in jobs]))


def status() -> RunStatus:
    (found,) = statuses(found_runs(["runs/tiny"])[0])
    return found


def test_a_waiting_chain_says_what_it_waits_for(run: Run, slurm: FakeSlurm):
    slurm.says("squeue", "101|PENDING|Resources|||tiny-prepare\n" + WAITING)
    found = status()
    assert (found.state, found.stage, found.job, found.reason) == ("queued", "prepare", "101", "Resources")
    slurm.says("squeue", WAITING)
    slurm.says("sacct", "101|COMPLETED|n1|tiny\n")
    found = status()
    assert (found.state, found.stage) == ("queued", "train") and "stage before" in found.reason


def test_a_requeued_training_says_after_what(run: Run, slurm: FakeSlurm):
    killed = "rank 1 on n2 was killed by signal 9"
    append(run.events_file, Requeued(job="102", reason=killed))
    slurm.says("squeue", "102|PENDING|BeginTime|||tiny-train\n103|PENDING|Dependency|||tiny-evaluate\n")
    assert status().reason == f"requeued after: {killed}"


@pytest.mark.parametrize("state", ["RESV_DEL_HOLD", "REQUEUE_FED", "OF_A_NEWER_SLURM"])
def test_a_job_in_any_other_state_waits_and_is_in_the_queue(run: Run, tmp_path: Path, slurm: FakeSlurm, state: str):
    slurm.says("squeue", f"Welcome to the cluster\n102|{state}|Reservation rv3 was deleted|||tiny-train\n")
    found = status()
    assert (found.state, found.stage, found.reason) == ("queued", "train", "Reservation rv3 was deleted")
    assert pipeline(tmp_path, "cancel", "runs/tiny", slurm=slurm).status == 0
    assert slurm.calls("scancel") == ["102"]


@pytest.mark.parametrize("accounting", [True, False])
@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("COMPLETED", "COMPLETED", "COMPLETED"), ("finished", "evaluate", "")),
        (("COMPLETED", "CANCELLED", "CANCELLED"), ("cancelled", "train", "")),
        (("COMPLETED", "FAILED", "CANCELLED"), ("failed", "train", "failed 3 times at step 7 without progress")),
    ],
)
def test_ended_jobs_are_judged_alike_with_and_without_accounting(
    run: Run, slurm: FakeSlurm, accounting: bool, states: tuple[str, ...], expected: tuple[str, ...]
):
    remember(run, accounting=accounting)
    if "FAILED" in states:
        append(run.events_file, GaveUp(job="102", reason=expected[2]))
    slurm.says("squeue", err=GONE, status=1)
    if accounting:
        slurm.says("sacct", "".join(f"{101 + i}|{state}|n1|tiny\n" for i, state in enumerate(states)))
    else:
        slurm.says("sacct", err="sacct: error: Slurm accounting storage is disabled\n", status=1)
        for i, state in enumerate(states):
            slurm.says(
                "scontrol", f"JobId={101 + i} JobState={state} Reason=None Restarts=0 JobName=tiny\n", call=i + 1
            )
    found = status()
    assert (found.state, found.stage, found.reason) == expected
    assert bool(slurm.calls("sacct")) == accounting


def test_jobs_that_slurm_has_forgotten_are_told_by_the_run_folder(run: Run, slurm: FakeSlurm):
    slurm.says("squeue", err=GONE, status=1)
    slurm.says("scontrol", err=GONE, status=1)
    assert status().state == "stopped"
    append(run.events_file, Finished(step=100))
    assert status().state == "finished"


def test_a_controller_that_is_away_is_said_and_nothing_is_made_up(run: Run, tmp_path: Path, slurm: FakeSlurm):
    slurm.says("squeue", err="squeue: error: Unable to contact slurm controller (connect failure)\n", status=1)
    done = pipeline(tmp_path, "status", "runs/tiny", slurm=slurm)
    assert done.status == 0
    assert "Unable to contact" in done.err and "run folder" in done.err
    assert "unknown" in done.out and "does not answer" in done.out


def test_many_runs_are_a_table_and_one_call_of_squeue(run: Run, tmp_path: Path, slurm: FakeSlurm):
    other = Run(tmp_path / "runs" / "other")
    other.path.mkdir()
    (other.path / "config.yaml").write_text(run.config_file.read_text().replace("name: tiny", "name: other"))
    remember(other, accounting=True)
    slurm.says("squeue", "101|PENDING|Resources|||tiny-prepare\n" + WAITING)
    done = pipeline(tmp_path, "status", slurm=slurm)
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "runs/tiny", "runs/other"]
    assert all("queued (prepare)" in line and "0/100" in line for line in lines[1:])
    assert len(slurm.calls("squeue")) == 1


@pytest.mark.parametrize("accounting", [True, False])
def test_a_slice_that_failed_is_named_though_others_succeeded(run: Run, slurm: FakeSlurm, accounting: bool):
    remember(run, accounting=accounting)
    slurm.says("squeue", err=GONE, status=1)
    if accounting:
        tasks = ("101_0|COMPLETED|n1", "101_1|FAILED|n2", "102|CANCELLED|None assigned", "103|CANCELLED|None assigned")
        slurm.says("sacct", "".join(f"{task}|tiny\n" for task in tasks))
    else:
        states = "".join(
            f"JobId={110 + i} ArrayJobId=101 ArrayTaskId={i} JobState={state} Reason=None Restarts=0 JobName=tiny\n"
            for i, state in enumerate(("COMPLETED", "FAILED"))
        )
        slurm.says("scontrol", "JobId=102 JobState=CANCELLED Reason=DependencyNeverSatisfied Restarts=0 JobName=tiny\n")
        slurm.says("scontrol", states, call=1)
    found = status()
    assert (found.state, found.stage, found.job) == ("failed", "prepare", "101_1")


@pytest.mark.parametrize("accounting", [True, False])
def test_a_sweep_that_was_cancelled_while_it_waited_is_cancelled(run: Run, slurm: FakeSlurm, accounting: bool):
    job_records.add_jobs(run, [Job("205_2", "train", 1, 9.0, "here", accounting)])
    slurm.says("squeue", err=GONE, status=1)
    slurm.says("sacct", "205_0|COMPLETED|n1|tiny\n205_[1-3%2]|CANCELLED by 0|None assigned|tiny\n")
    slurm.says(
        "scontrol",
        "JobId=205 ArrayJobId=205 ArrayTaskId=1-3%2 JobState=CANCELLED Reason=None Restarts=0 JobName=tiny\n",
    )
    assert (status().state, status().job) == ("cancelled", "205_2")


def test_a_run_whose_job_failed_and_that_was_finished_by_hand_is_finished(run: Run, slurm: FakeSlurm):
    slurm.says("squeue", err=GONE, status=1)
    slurm.says("sacct", "101|COMPLETED|n1|tiny\n102|FAILED|n1|tiny\n103|CANCELLED|None assigned|tiny\n")
    append(run.events_file, GaveUp(job="102", reason="failed 3 times"))
    assert status().state == "failed"
    append(run.events_file, Resumed(step=100))
    append(run.events_file, Finished(step=100))
    assert (status().state, status().reason) == ("finished", "its job was not")


def test_a_damaged_config_does_not_hide_the_other_runs(run: Run, tmp_path: Path, slurm: FakeSlurm):
    other = tmp_path / "runs" / "torn"
    other.mkdir()
    (other / "config.yaml").write_text("name: [")
    done = pipeline(tmp_path, "status", slurm=slurm)
    assert done.status == 0 and "runs/tiny" in done.out
    assert "unknown" in next(line for line in done.out.splitlines() if "runs/torn" in line)


def test_a_running_training_ends_after_the_steps_that_are_left_at_the_pace_of_the_last_ten(run: Run, slurm: FakeSlurm):
    lines = ({"step": n, "time": n, "train/loss": 1.0, "time/step_s": 9 if n < 81 else 2} for n in range(91))
    run.metrics_file.write_bytes(b"".join(map(journal.encode, lines)))
    slurm.says("squeue", "102|RUNNING|None|n1|30:00|tiny-train\n")
    found = status()
    assert (found.step, found.eta_s) == (90, pytest.approx(20))


def test_it_shows_what_a_run_started_from_and_who_holds_its_checkpoints(
    run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    (branched(run).checkpoints / "step_00000008").mkdir()
    pin(run.checkpoints / "step_00000008", run.path.with_name("long"))
    pin(run.checkpoints / "step_00000008", run.path.with_name("old"), days=0)
    found = status()
    assert ["step 4" in found.origin[0], "hf:/models/first" in found.origin[1]] == [True, True]
    held, dead = found.pinned
    assert "runs/long" in held and dead.endswith(".json")
    Console(width=200).print(view([found]))
    shown = capsys.readouterr().out
    assert all(line in shown for line in (*found.origin, *found.pinned))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("launch/jobs.json", "{}"),
        ("events.jsonl", None),
        ("launch/attempts.jsonl", None),
        ("config.yaml", "{}"),
        ("provenance.json", '{"starts": [{"init": 3}]}'),
    ],
)
def test_a_damaged_file_hides_no_other_run(run: Run, slurm: FakeSlurm, name: str, content: str | None):
    """Without content a folder is in its place."""
    other = Run(run.path.with_name("other"))
    shutil.copytree(run.path, other.path)
    file = run.path / name
    file.unlink(missing_ok=True)
    file.mkdir() if content is None else file.write_text(content)
    found = {Path(one.run).name: one for one in statuses(found_runs(["runs"])[0])}
    assert found["tiny"].state == "unknown" and file.name in found["tiny"].reason
    assert found["other"].state != "unknown"


def test_a_run_that_has_ended_shows_what_its_jobs_cost_by_sacct(run: Run, tmp_path: Path, slurm: FakeSlurm):
    attempts.note(run, AttemptBegan(time=1e9, stage="train", job="102", gpus=8, cpus=96))
    attempts.note(run, AttemptEnded(time=1e9 + 3600, stage="train", job="102"))
    slurm.says("squeue", "102|RUNNING|None|n1|30:00|tiny-train\n")
    found = status()
    assert found.usage is not None and (found.usage.gpu_hours, found.usage.node_kwh) == (8, None)
    assert slurm.calls("sacct") == [call for call in slurm.calls("sacct") if "--duplicates" not in call]
    slurm.says("squeue", err=GONE, status=1)
    slurm.says("sacct", "".join(f"{101 + i}|COMPLETED|n1|tiny\n" for i in range(3)), call=2)
    start = datetime.fromtimestamp(1e9 - 60).isoformat()
    slurm.says("sacct", f"102|{start}|7200|cpu=96,gres/gpu=8|7200000|tiny-train\n")
    done = pipeline(tmp_path, "status", "runs/tiny", slurm=slurm)
    (line,) = [line for line in done.out.splitlines() if line.startswith("usage")]
    assert "16.00 GPU-hours in 1 allocation;" in line and "2.000 kWh" in line


@pytest.mark.slow
def test_watching_shows_the_run_until_control_c(run: Run, tmp_path: Path, slurm: FakeSlurm):
    slurm.says("squeue", "101|PENDING|Resources|||tiny-prepare\n" + WAITING)
    screen, terminal = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "status", "runs/tiny", "--watch"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": slurm.path, "TERM": "xterm"},
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        # Tests started in the background ignore the signal, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while b"queued" not in shown:
        shown += os.read(screen, 1 << 16)
    slurm.says("squeue", "101|RUNNING|None|n1|30:00|tiny-prepare\n" + WAITING)
    while b"running" not in shown:
        shown += os.read(screen, 1 << 16)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0
    os.close(screen)


def test_a_job_of_another_name_under_an_old_id_is_somebody_elses(run: Run, slurm: FakeSlurm):
    job_records.forget_jobs(run, {"101", "102", "103"})
    job_records.add_jobs(run, [Job("102", "train", 1, 9.0, "here", True, name="tiny-train")])
    append(run.events_file, Finished(step=100))
    slurm.says("squeue", "102|RUNNING|None|n1|30:00|other-train\n")
    slurm.says("sacct", "102|RUNNING|n1|other-train\n")
    assert status().state == "finished"


def test_a_run_shows_the_last_validation_and_the_tokens_of_each_source(run: Run, tmp_path: Path, slurm: FakeSlurm):
    line = {"train/loss": 2.0, "train/tokens_seen": 3_000_000, "data/web/tokens_seen": 2_000_000}
    with run.metrics_file.open("ab") as file:
        for step in (1, 2, 3):
            file.write(journal.encode({"step": step, "time": 1.0, **line, "data/code/tokens_seen": 1_000_000}))
            if step < 3:
                validation = {"val/loss": 3.0, "val/web/loss": 2.5 + step, "val/code/loss": 1.25}
                file.write(journal.encode({"step": step, "time": 1.0, **validation}))
    found = status()
    assert found.validation == {"web": 4.5, "code": 1.25}
    assert found.source_tokens == {"web": 2_000_000, "code": 1_000_000} and found.step == 3
    shown = pipeline(tmp_path, "status", "runs/tiny").out
    assert "web 4.5000, code 1.2500" in shown and "web 2.0M" in shown
