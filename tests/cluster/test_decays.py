"""Decays of a stable run: whatever happens to it, each is trained once, from the checkpoint of its step."""

from __future__ import annotations

import json

import pytest

from pipeline.checkpoint.pins import pins
from pipeline.run.folder import Run
from pipeline.run.related import read_branches
from tests import experiment
from tests.cluster.support import Cluster
from tests.cluster.training import Training, describe, now, prepare

pytestmark = pytest.mark.timeout(600)

STEPS = (40, 80, 120)
DECAY = 10
# Steps of about 50 ms; only the newest checkpoint is kept, so that only pins keep those of the decays.
OVERRIDES = (
    "optimizer.schedule=wsd", "optimizer.cosine_cycle_iters=null", f"optimizer.decay_iters={DECAY}",
    "train.max_iters=140", "train.checkpoint_interval=20", "train.val_interval=20", "checkpoint.keep_last=1",
    "checkpoint.keep_best=false", "model.d_model=128", "model.d_ff=256", "model.num_layers=4", "train.batch_size=32",
)  # fmt: skip
SITE = {"nodes": 1, "tasks_per_node": 1, "partition": "low"}


@pytest.fixture(scope="module")
def data(cluster: Cluster) -> None:
    prepare(cluster)


def described(cluster: Cluster, name: str, **site: object) -> Training:
    return describe(cluster, name, *OVERRIDES, "--decay-at", ",".join(map(str, STEPS)), **site)


def test_a_preempted_stable_run_whose_node_is_killed_starts_each_decay_once(cluster: Cluster, data: None) -> None:
    # Exclusive: the node that is killed holds nothing but the stable run.
    stable = described(cluster, "stable", train=SITE, extra_sbatch={"exclusive": True})
    stable.submit()
    branches = read_branches(Run(stable.run))
    assert [branch.step for branch in branches] == list(STEPS)
    runs = {one.step: Training(cluster, one.run.path, stable.config, stable.site, ()) for one in branches}
    cluster.run("scancel", *(run.job("evaluate") for run in (stable, *list(runs.values())[1:])))  # one is enough
    stable.wait_for_step(10)
    job = stable.job("train")
    [node] = cluster.nodes_of(job)
    preempted_at = now()
    cluster.sbatch("sleep 1", "--partition=high", "--exclusive", f"--nodelist={node}")
    stable.wait_for(lambda: len(stable.events("resumed")) == 1, 120, "not resumed after the preemption")
    stable.wait_for_step(max(STEPS[0], stable.events("resumed")[0]["step"]) + 1)  # released or not: both must do
    [node] = cluster.nodes_of(job)
    cluster.kill_node(node)
    try:
        ended = stable.wait_for_end("train")
    finally:
        cluster.start_node(node)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), stable.words()
    assert stable.events("preempted")[0]["time"] > preempted_at
    released = stable.events("branch_released")
    assert [event["step"] for event in released] == list(STEPS), stable.words()
    assert released[0]["time"] < stable.events("finished")[0]["time"]
    for step, run in runs.items():
        ended = run.wait_for_end("train", 120)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), run.words()
        [began] = run.events("started")
        assert began["step"] == step
        assert [logged for logged, _ in experiment.curve(run.run)] == list(range(step + 1, step + DECAY + 1))
        [start] = Run(run.run).provenance()
        assert start["init"]["from"].endswith(f"stable/checkpoints/step_{step:08d}")
    assert not pins(stable.run / "checkpoints")
    assert runs[STEPS[0]].wait_for_end("evaluate")["JobState"] == "COMPLETED"
    assert "Decays by final validation loss" in (stable.run / "report.html").read_text()
    shown = json.loads(stable.pipeline("status", str(stable.run), "--json").stdout)
    assert [one["step"] for one in shown] == [140, *(step + DECAY for step in STEPS)]
    assert {one["parent"] for one in shown[1:]} == {shown[0]["run"]}


def test_cancelling_the_stable_run_cancels_the_decays_that_wait(cluster: Cluster, data: None) -> None:
    stable = described(cluster, "stable-cancelled", train=SITE, extra_sbatch={"begin": "now+1hour"})
    stable.submit()
    branches = [branch.run for branch in read_branches(Run(stable.run))]
    jobs = [json.loads(branch.jobs_file.read_text())["jobs"][0]["id"] for branch in branches]
    alone = stable.pipeline("cancel", str(branches[0].path))
    assert jobs[0] in alone.stdout and cluster.show(jobs[1])["JobState"] == "PENDING"
    stable.pipeline("cancel", str(stable.run))
    for job in jobs:
        cluster.wait_for_state(job, {"CANCELLED"})
