"""The commands of a user on runs of a cluster: status, logs, cancel; and edits of the checkout meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.layout import published, step_of
from tests import experiment
from tests.cluster.support import ROOT, Cluster, open_cluster
from tests.cluster.training import Training, describe, prepare, processes_of, start
from tests.launch.notify.support import SECRET, script, write_settings
from tests.train.profile.traces import spans

_ENDLESS = 100_000


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with a working folder for this file only, which holds prepared data; its jobs tell how they end."""
    own = open_cluster(cluster.settings.state, cluster.work / "commands")
    prepare(own)
    tell = script(own.work / "tell", f'echo "$PIPELINE_RUN $PIPELINE_EVENT" >> {own.work}/told')
    # Nobody listens on a node.
    write_settings(own.work / "settings", command=[str(tell)], webhook=f"http://127.0.0.1:9/{SECRET}")
    yield own
    own.cancel_all()


@pytest.fixture(scope="module")
def diverging(cluster: Cluster) -> Training:
    """A run whose second step always fails: the first one, which is saved, makes the weights diverge.

    Its site has no accounting.
    """
    return start(
        cluster, "diverging", "optimizer.learning_rate=1e30", "optimizer.warmup_iters=0", "guard.max_bad_steps=1",
        "train.checkpoint_interval=1", train={"nodes": 1}, accounting=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def training(cluster: Cluster, diverging: Training) -> Training:
    """A run in the middle of training on two nodes, which ends only when cancelled; `diverging` fails meanwhile."""
    run = start(cluster, "endless", f"train.max_iters={_ENDLESS}", f"optimizer.cosine_cycle_iters={_ENDLESS}")
    run.wait_for_step(60)
    return run


def test_status_shows_the_state_of_a_run(cluster: Cluster, training: Training) -> None:
    job = training.job("train")
    found = _status(training)
    curve = dict(experiment.curve(training.run))
    assert (found["state"], found["stage"], found["job"]) == ("running", "train", job)
    assert cluster.run("scontrol", "show", "hostnames", found["nodes"]).split() == cluster.nodes_of(job)
    assert 60 <= found["step"] <= max(curve)
    assert (found["loss"], found["max_iters"], found["restarts"]) == (curve[found["step"]], _ENDLESS, 0)
    assert found["checkpoint"] in [step_of(path) for path in published(training.run / "checkpoints")]
    assert found["tokens_per_s"] > 0
    assert found["eta_s"] > 0
    assert 0 < found["goodput"] < 1
    shown = training.pipeline("status", str(training.run)).stdout
    for words in ("running (train)", f"{job}, train, on {found['nodes']}", f"/{_ENDLESS}", "restarts", "goodput"):
        assert words in shown


def test_logs_show_every_attempt_of_the_requested_rank(training: Training) -> None:
    job = training.job("train")
    for rank in (0, 1):
        shown = training.pipeline("logs", str(training.run), "--rank", str(rank)).stdout
        title = f"==> train, job {job}, attempt 0, rank {rank} <==\n"
        written = (training.run / "logs" / job / f"attempt_0_rank_{rank}.log").read_text()
        assert shown.startswith(title)
        assert written.startswith(shown.removeprefix(title))
    assert "step" in training.pipeline("logs", str(training.run)).stdout
    missing = training.pipeline("logs", str(training.run), "--rank", "2")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "0, 1" in missing.stderr


def test_a_job_is_profiled_on_both_nodes_while_it_trains(training: Training) -> None:
    done = training.pipeline("profile", str(training.run), "--steps", "2", "--ranks", "0,1")
    assert done.returncode == 0, done.stderr
    traces = [Path(file) for file in done.stdout.splitlines() if "trace_rank_" in file]
    began = training.events("profile_began")[-1]["step"]
    assert len(traces) == 2
    for trace in traces:
        named = [name for name, _, _ in spans(trace) if name.startswith("step")]
        assert named == [f"step {began + 1}", f"step {began + 2}"]
    training.wait_for_step(began + 10)


def test_a_rank_that_is_stopped_on_the_other_node_is_named_and_the_run_continues(
    cluster: Cluster, training: Training
) -> None:
    """Half a minute long, which is the limit for a hang."""
    _, second = cluster.nodes_of(training.job("train"))
    (rank,) = processes_of(cluster, second, "pipeline train")
    os.kill(rank, signal.SIGSTOP)
    try:
        training.wait_for(lambda: bool(training.events("hang")), 55, "no hang is reported")
        shown = training.pipeline("status", str(training.run)).stdout
    finally:
        os.kill(rank, signal.SIGCONT)
    hang = training.events("hang")[-1]
    assert (hang["ranks"], hang["hosts"]) == ([1], [second])
    assert f"rank 1 on {second}" in shown
    training.wait_for(lambda: len(list(Path(hang["path"]).glob("rank_*.txt"))) == 2, 20, "a rank left no stack")
    training.wait_for_step(hang["step"] + 10)
    training.wait_for(lambda: bool(training.events("hang_ended")), 20, "the end of the hang is not reported")
    assert training.events("hang_ended")[-1]["seconds"] > 25
    (network,) = training.events("network")
    assert (network["transport"], network["ranks"], network["nodes"]) == ("gloo over TCP", 2, 2)
    assert network["gb_per_s"] > 0


def test_a_run_in_the_queue_is_not_submitted_again(training: Training) -> None:
    refused = training.try_to_submit()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"job {training.job('train')}" in refused.stderr


def test_cancel_saves_and_ends_every_job_and_reports_it(cluster: Cluster, training: Training) -> None:
    job, evaluation = training.job("train"), training.job("evaluate")
    following = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "logs", "-f", str(training.run)],
        cwd=ROOT, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun = experiment.last_step(training.run)
    training.wait_for_step(begun + 20)  # `logs -f` prints lines as they are written
    done = training.pipeline("cancel", str(training.run))
    assert (done.stdout, done.stderr) == (f"{training.run}: cancelled job {job}, {evaluation}\n", "")
    ended = training.wait_for_end("train", 60)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), training.words()
    assert cluster.show(evaluation)["JobState"] == "CANCELLED"
    assert [e["job"] for e in training.events("cancelled")] == [job, evaluation]
    assert training.events("requeued") == []
    (stopped,) = training.events("preempted")
    last = experiment.last_step(training.run)
    assert stopped["step"] == last == max(step_of(path) or 0 for path in published(training.run / "checkpoints"))

    out, err = following.communicate(timeout=60)  # it ends by itself with the run
    assert (following.returncode, err) == (0, "")
    log = (training.run / "logs" / job / "attempt_0_rank_0.log").read_text()
    title, words = f"==> train, job {job}, attempt 0, rank 0 <==\n", f"==> Slurm and the batch script, job {job} <==\n"
    shown, _, slurm = out.partition(words)
    assert shown == title + log
    assert f"*** JOB {job} ON" in slurm and "CANCELLED" in slurm
    found = _status(training)
    assert (found["state"], found["step"], found["checkpoint"]) == ("cancelled", last, last)
    again = training.pipeline("cancel", str(training.run))
    assert again.stdout.startswith(f"{training.run}: ") and "cancelled" not in again.stdout


def test_editing_the_checkout_while_a_job_waits_changes_nothing(cluster: Cluster) -> None:
    checkout = cluster.work / "checkout"
    for part in ("pipeline", "slurm"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", checkout)
    main = checkout / "pipeline" / "__main__.py"
    main.write_text(f"import sys\nprint('as it was submitted', file=sys.stderr)\n{main.read_text()}")
    run = start(
        cluster, "edited", "train.max_iters=20", checkout=checkout, extra_sbatch={"hold": True},
        train={"nodes": 1},
    )  # fmt: skip
    for file in (checkout / "pipeline").rglob("*.py"):
        file.write_text("raise SystemExit('edited afterwards')\n")
    cluster.run("scontrol", "release", run.job("train"))
    ended = run.wait_for_end("train", 120)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), run.words()
    assert [step for step, _ in experiment.curve(run.run)] == list(range(1, 21))
    assert run.pipeline("logs", str(run.run)).stdout.splitlines()[1] == "as it was submitted"


def test_a_sweep_is_one_array_that_trains_and_evaluates_a_run_per_value(cluster: Cluster) -> None:
    swept = describe(cluster, "sweep", "train.max_iters=10", train={"nodes": 1})
    command = ["submit", str(swept.config), "--site", str(swept.site), *swept.overrides]
    done = swept.pipeline(*command, "--sweep", "optimizer.learning_rate=1e-2,1e-3")
    assert done.returncode == 0, done.stderr
    runs = [replace(swept, run=swept.run.with_name(f"sweep-learning_rate-{rate}")) for rate in ("1e_2", "1e_3")]
    ids = [run.job("train") for run in runs]
    assert [job.partition("_")[2] for job in ids] == ["0", "1"]
    assert len({job.partition("_")[0] for job in ids}) == 1
    for run in runs:
        assert run.wait_for_end("evaluate", 240)["JobState"] == "COMPLETED", run.words()
        assert [step for step, _ in experiment.curve(run.run)] == list(range(1, 11))
        assert (run.run / "evaluation.json").exists()
        found = _status(run)
        assert (found["state"], _told(run)) == ("finished", ["finished"])
        cost = found["usage"]
        assert cost["allocations"] == 2 and cost["cpu_core_hours"] > 0, "training and evaluation, by sacct"
        assert (cost["gpu_hours"], cost["gpu_kwh"], cost["node_kwh"]) == (0, None, None)
        notes = experiment.lines(run.run / "launch" / "attempts.jsonl")
        assert [note["job"] for note in notes if note["event"] == "charged"] == [run.job("train")]
        assert f"==> train, job {run.job('train')}, attempt 0, rank 0 <==" in run.pipeline("logs", str(run.run)).stdout
    assert experiment.curve(runs[0].run) != experiment.curve(runs[1].run)


def test_a_run_that_fails_three_times_at_the_same_step_is_not_requeued(cluster: Cluster, diverging: Training) -> None:
    run = diverging
    ended = run.wait_for_end("train", 240)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), run.words()
    (gave_up,) = run.events("gave_up")
    assert "3 times" in gave_up["reason"] and "step 1" in gave_up["reason"]
    assert [len(run.events(kind)) for kind in ("restarted", "requeued")] == [1, 1], "on its nodes, then elsewhere"
    evaluation = run.job("evaluate")
    run.wait_for(lambda: cluster.show(evaluation)["JobState"] == "CANCELLED", 30, "the evaluation is not cancelled")
    found = _status(run)
    assert (found["state"], found["stage"], found["reason"]) == ("failed", "train", gave_up["reason"])
    assert _told(run) == ["failed", "failed", "gave_up"]
    assert (found["usage"]["allocations"], found["usage"]["cpu_core_hours"] > 0) == (2, True)
    log = (run.run / "launch" / f"{run.job('train')}_0_log.err").read_text()
    assert log.count("webhook") == 3 and SECRET not in log
    titles = [line for line in run.pipeline("logs", str(run.run)).stdout.splitlines() if line.startswith("==> train")]
    names = [f"==> train, job {run.job('train')}, attempt {i}, rank 0" for i in range(3)]
    assert [title[: len(name)] for title, name in zip(titles, names, strict=True)] == names
    assert titles[0] == f"{names[0]} <=="
    for before, title in enumerate(titles[1:]):
        assert f"; it began because attempt {before} ended: " in title and "not finite" in title, title


def test_an_unreachable_controller_is_named_and_nothing_is_submitted(cluster: Cluster, training: Training) -> None:
    run = describe(cluster, "unreachable")
    with cluster.without_controller():
        refused = run.try_to_submit()
        found = training.pipeline("status", str(training.run), "--json")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "controller does not answer" in refused.stderr
    assert not run.run.exists()
    assert json.loads(found.stdout)[0]["state"] == "cancelled", "read from the run folder"
    assert "run folder" in found.stderr


def _told(run: Training) -> list[str]:
    """Returns what the jobs of a run told, in order."""
    lines = [line.split() for line in (run.cluster.work / "told").read_text().splitlines()]
    return [event for folder, event in lines if folder == str(run.run)]


def _status(run: Training) -> dict[str, Any]:
    done = run.pipeline("status", str(run.run), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = json.loads(done.stdout)
    return found
