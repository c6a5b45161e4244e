"""The host's side of a rank, with a script in place of the real command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import EXIT_FAILED, EXIT_STOPPED
from pipeline.files import write_json
from pipeline.run import attempts
from pipeline.run.attempts import RankEnded, RankFailed
from pipeline.run.events import Cancelled, EventLog
from pipeline.run.folder import Run
from tests.launch.notify.support import webhook, write_settings
from tests.launch.support import ROOT, SITE, FakeSlurm, events, make_run

RANK = {
    "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0",
}  # fmt: skip
SETTINGS = {"PYTHONPATH": str(ROOT), **RANK}
START = "from pipeline.launch.job.rank import run_rank; run_rank('runs/tiny/launch/train.json')"
LOG = "logs/7/attempt_0_rank_0.log"


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Run:
    made, _ = make_run(tmp_path, monkeypatch)
    return made


def start(
    run: Run, script: str, wait_for: str = "ready", *, notify: Path | None = None, log: str = LOG, **variables: str
) -> subprocess.Popen[bytes]:
    """The rank of a job, whose command is this script; returns when its log holds a word."""
    python = Path("python").absolute()
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    site = {**SITE, "python": str(python)}
    task = {"run": str(run.path), "commands": [["train", str(run.config_file)]]}
    write_json(
        run.launch / "train.json", {"stage": "train", "tasks": [task], "site": site, "notify": str(notify or "")}
    )
    rank = subprocess.Popen(
        [sys.executable, "-c", START],
        env={**os.environ, **SETTINGS, **variables},
    )
    ended = False
    while not (run.path / log).exists() or wait_for not in (run.path / log).read_text():
        assert not ended, "it ended without the word"
        ended = rank.poll() is not None
        time.sleep(0.02)
    return rank


def notes(run: Run) -> list[tuple[str, int]]:
    return [(n.kind, n.status) for n in attempts.notes(run, "train").of(RankEnded)]


def test_a_signal_is_passed_on_and_the_status_of_the_command_is_the_rank_s(run: Run):
    rank = start(run, "trap 'echo saved; exit 85' USR2; echo ready; while :; do sleep 0.05; done")
    rank.send_signal(signal.SIGUSR2)
    assert rank.wait(30) == EXIT_STOPPED
    assert (run.path / LOG).read_text() == "ready\nsaved\n"
    assert notes(run) == []


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_command_that_dies_of_the_signal_before_it_listens_has_stopped_and_not_failed(
    run: Run, number: signal.Signals, wrapped: bool
):
    """Preemption may come by either; apptainer, in between, ends with the signal's number in its status."""
    dying = f"trap 'exit {128 + number}' {number}; while :; do sleep 0.05; done"
    rank = start(run, f"echo ready; {dying if wrapped else 'exec sleep 60'}")
    rank.send_signal(number)
    assert rank.wait(30) == EXIT_STOPPED
    assert notes(run) == [("rank_stopped", EXIT_STOPPED)]


@pytest.mark.parametrize(("state", "recorded"), [("CANCELLED by 0", ["7"]), ("PREEMPTED", [])])
def test_a_cancellation_is_recorded_and_a_preemption_is_not(
    run: Run, slurm: FakeSlurm, state: str, recorded: list[str]
):
    slurm.says("sacct", f"7|{state}|n1|tiny-train\n")
    rank = start(run, "trap 'exit 85' TERM; echo ready; while :; do sleep 0.05; done")
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == EXIT_STOPPED
    assert [event.job for event in EventLog.load(run.events_file).of(Cancelled)] == recorded


@pytest.mark.timing
def test_the_signal_does_not_wait_for_accounting(run: Run, slurm: FakeSlurm):
    (slurm.folder / "sacct").write_text("#!/bin/sh\nsleep 5\necho '7|CANCELLED by 0|n1|tiny-train'\n")
    rank = start(run, "trap 'date +%s.%N; exit 85' TERM; echo ready; while :; do sleep 0.05; done")
    asked = time.time()
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(30) == EXIT_STOPPED
    assert float((run.path / LOG).read_text().split()[-1]) - asked < 3
    assert events(run.path)[-1]["event"] == "cancelled"


def test_a_config_that_cannot_be_read_is_noted_as_the_cause(run: Run):
    run.config_file.write_text("name: [")
    write_json(
        run.launch / "train.json",
        {"stage": "train", "tasks": [{"run": str(run.path), "commands": [["train"]]}], "site": SITE, "notify": ""},
    )
    done = subprocess.run(
        [sys.executable, "-c", START], env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "config.yaml" in done.stderr and "Traceback" not in done.stderr
    (failed,) = attempts.notes(run, "train").of(RankFailed)
    assert failed.status == 2 and "config.yaml" in failed.said


def test_a_node_that_does_not_see_the_image_is_noted(run: Run):
    config = run.config_file.read_text()
    run.config_file.write_text(config.replace("image: null", "image: /nowhere/pipeline.sif"))
    assert run.config_file.read_text() != config
    apptainer = Path("apptainer").absolute()  # whether there is a real one does not matter
    apptainer.write_text("#!/bin/sh\nexit 0\n")
    apptainer.chmod(0o755)
    path = f"{apptainer.parent}{os.pathsep}{os.environ['PATH']}"
    rank = start(run, "exit 0", wait_for="cannot be read", PATH=path)
    assert rank.wait(30) == EXIT_FAILED
    assert notes(run) == [("rank_failed", EXIT_FAILED)]
    (failed,) = attempts.notes(run, "train").of(RankFailed)
    assert "/nowhere/pipeline.sif cannot be read" in failed.said


@pytest.mark.parametrize(("size", "name"), [("64", "rank_13"), ("65", "rank_8")])
def test_of_many_ranks_those_of_a_node_share_a_log(run: Run, size: str, name: str):
    log = f"logs/7/attempt_0_{name}.log"
    where = {"SLURM_PROCID": "13", "SLURM_LOCALID": "5", "SLURM_STEP_NUM_TASKS": size}
    where |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    assert start(run, "echo ready; exit 3", log=log, **where).wait(30) == 3
    (failed,) = attempts.notes(run, "train").of(RankFailed)
    assert (failed.rank, failed.said) == (13, "ready")


@pytest.mark.parametrize(("ending", "status"), [("exit 3", 3), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_a_command_that_ends_by_itself_is_noted_with_its_status(run: Run, ending: str, status: int):
    rank = start(run, f"echo ready; sleep 0.3; {ending}")
    assert rank.wait(30) == status
    assert notes(run) == [("rank_failed", status)]


def test_a_rank_that_is_killed_leaves_no_command_running(run: Run):
    rank = start(run, "echo ready $$; exec sleep 60")
    command = Path("/proc") / (run.path / LOG).read_text().split()[1]
    rank.kill()
    rank.wait(30)
    end = time.monotonic() + 10
    while command.exists() and "State:\tZ" not in (command / "status").read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("rank", "messages"), [("0", 1), ("1", 0)])
def test_a_spike_is_told_beside_rank_0_only(run: Run, tmp_path: Path, rank: str, messages: int):
    spike = """echo '{"time": 5.0, "event": "spike", "step": 12, "loss": "9.5"}' >> runs/tiny/events.jsonl"""
    with webhook() as hook:
        settings = write_settings(tmp_path / "home", webhook=hook.address)
        variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": rank}
        log = f"logs/7/attempt_0_rank_{rank}.log"
        started = start(run, f"{spike}; echo ready", wait_for="ready", notify=settings, log=log, **variables)
        assert started.wait(30) == 0
    assert [("step 12" in text, "9.5" in text) for text in hook.texts] == [(True, True)] * messages
