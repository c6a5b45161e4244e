"""What a person does with runs on a cluster: look, read, cancel, edit the checkout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipeline.checkpoint.layout import published, step_of
from tests import experiment
from tests.cluster.support import ROOT, Cluster, open_cluster
from tests.cluster.training import Training, describe, prepare, start

_ENDLESS = 100_000


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with a working folder for this file alone, which holds prepared data."""
    own = open_cluster(cluster.settings.state, cluster.work / "commands")
    prepare(own)
    yield own
    own.cancel_all()


@pytest.fixture(scope="module")
def diverging(cluster: Cluster) -> Training:
    """A run whose second step fails, every time: the first, which is saved, blows the weights up.

    Its site does without accounting.
    """
    return start(
        cluster, "diverging", "optimizer.learning_rate=1e30", "optimizer.warmup_iters=0", "guard.max_bad_steps=1",
        "train.checkpoint_interval=1", train={"nodes": 1}, accounting=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def training(cluster: Cluster, diverging: Training) -> Training:
    """A run that trains on two nodes until somebody cancels it, in the middle of it; `diverging` fails meanwhile."""
    run = start(cluster, "endless", f"train.max_iters={_ENDLESS}", f"optimizer.cosine_cycle_iters={_ENDLESS}")
    run.wait_for_step(60)
    return run


def test_status_shows_how_a_run_is(cluster: Cluster, training: Training) -> None:
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


def test_logs_show_every_attempt_of_the_rank_that_is_asked_for(training: Training) -> None:
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
    assert "ranks that have: 0, 1" in missing.stderr


def test_a_run_in_the_queue_is_not_submitted_again(training: Training) -> None:
    refused = training.try_to_submit()
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert f"is in the queue already as job {training.job('train')}" in refused.stderr


def test_cancel_saves_ends_all_and_says_so(cluster: Cluster, training: Training) -> None:
    job, evaluation = training.job("train"), training.job("evaluate")
    following = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "logs", "-f", str(training.run)],
        cwd=ROOT, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    begun = experiment.last_step(training.run)
    training.wait_for_step(begun + 20)  # it follows what is written while it looks
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

    out, err = following.communicate(timeout=60)  # it ends by itself, since the run has ended
    assert (following.returncode, err) == (0, "")
    log = (training.run / "logs" / job / "attempt_0_rank_0.log").read_text()
    title, words = f"==> train, job {job}, attempt 0, rank 0 <==\n", f"==> Slurm and the batch script, job {job} <==\n"
    shown, _, slurm = out.partition(words)
    assert shown == title + log
    assert f"*** JOB {job} ON" in slurm and "CANCELLED" in slurm
    found = _status(training)
    assert (found["state"], found["step"], found["checkpoint"]) == ("cancelled", last, last)
    again = training.pipeline("cancel", str(training.run))
    assert again.stdout == f"{training.run}: no job in the queue\n"


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


def test_a_sweep_is_one_array_that_trains_and_evaluates_a_run_for_every_value(cluster: Cluster) -> None:
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
        assert _status(run)["state"] == "finished"
        assert f"==> train, job {run.job('train')}, attempt 0, rank 0 <==" in run.pipeline("logs", str(run.run)).stdout
    assert experiment.curve(runs[0].run) != experiment.curve(runs[1].run)


def test_a_run_that_fails_three_times_at_the_same_step_is_left_alone(cluster: Cluster, diverging: Training) -> None:
    run = diverging
    ended = run.wait_for_end("train", 240)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), run.words()
    (gave_up,) = run.events("gave_up")
    assert gave_up["reason"].startswith("failed 3 times at step 1 without progress: ")
    assert len(run.events("requeued")) == 2
    evaluation = run.job("evaluate")
    run.wait_for(lambda: cluster.show(evaluation)["JobState"] == "CANCELLED", 30, "the evaluation is not taken back")
    found = _status(run)
    assert (found["state"], found["stage"], found["reason"]) == ("failed", "train", gave_up["reason"])
    titles = [line for line in run.pipeline("logs", str(run.run)).stdout.splitlines() if line.startswith("==> train")]
    assert titles == [f"==> train, job {run.job('train')}, attempt {i}, rank 0 <==" for i in range(3)]


def test_without_its_controller_slurm_is_named_and_nothing_is_submitted(cluster: Cluster, training: Training) -> None:
    run = describe(cluster, "unreachable")
    with cluster.without_controller():
        refused = run.try_to_submit()
        found = training.pipeline("status", str(training.run), "--json")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "Slurm's controller does not answer" in refused.stderr
    assert not run.run.exists()
    assert json.loads(found.stdout)[0]["state"] == "cancelled", "the run folder tells"
    assert "what follows is from the run folder alone" in found.stderr


def _status(run: Training) -> dict[str, Any]:
    done = run.pipeline("status", str(run.run), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = json.loads(done.stdout)
    return found
