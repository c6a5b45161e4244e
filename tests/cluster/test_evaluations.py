"""Tasks on a real Slurm: each checkpoint is evaluated once, by a job of its own, whatever happens to the training."""

from __future__ import annotations

import pytest

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.pins import pins
from pipeline.launch.slurm import job_records
from pipeline.run.evaluations import evaluations
from pipeline.run.folder import Run
from tests.cluster.support import Cluster
from tests.cluster.training import describe, prepare
from tests.evaluate.conftest import CHOICE, write_task

EVERY = 150
# Steps of about 50 ms; only the newest checkpoint is kept, so that only pins keep those that wait for their evaluation.
OVERRIDES = (
    f"train.max_iters={3 * EVERY}", f"optimizer.cosine_cycle_iters={3 * EVERY}", f"train.checkpoint_interval={EVERY}",
    f"train.val_interval={EVERY}", "checkpoint.keep_last=1", "checkpoint.keep_best=false", "model.context_length=64",
    "model.d_model=128", "model.d_ff=256", "model.num_layers=4",
)  # fmt: skip


@pytest.mark.timeout(600)
def test_each_checkpoint_is_evaluated_once_although_training_is_requeued(cluster: Cluster) -> None:
    prepare(cluster)
    tasks = cluster.work / "tasks"
    rows = [{"question": "war and", "choices": ["peace", "law"], "answer": n % 2} for n in range(4)]
    write_task(tasks, "choice", CHOICE, rows)
    asked = ("evaluate.tasks=[choice]", f"evaluate.include_path={tasks}", "evaluate.every_checkpoint=true")
    training = describe(cluster, "evaluated", *OVERRIDES, *asked, train={"nodes": 1, "tasks_per_node": 1})
    training.submit()
    run = Run(training.run)
    training.wait_for(lambda: bool(job_records.evaluation_jobs(run)), 240, "no evaluation was submitted")
    cluster.run("scontrol", "requeue", training.job("train"))
    ended = training.wait_for_end("train")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), training.words()
    beside = job_records.evaluation_jobs(run)
    steps = [int(job.name.removeprefix("evaluated-evaluate-")) for job in beside]
    assert sorted(steps) == sorted({EVERY, 2 * EVERY, *(event["step"] for event in training.events("preempted"))})
    for job in beside:
        assert cluster.wait_for_state(job.id, {"COMPLETED"}, 240)["Nice"] == "10000"
    assert training.wait_for_end("evaluate")["JobState"] == "COMPLETED", training.words()
    found = [(one["step"], one["name"], one["tasks"]["choice"]["documents"]) for one in evaluations(run)]
    assert found == [(step, "choice", len(rows)) for step in (*sorted(steps), 3 * EVERY)]
    assert not pins(run.checkpoints)
    assert [step_of(path) for path in published(run.checkpoints)] == [3 * EVERY]
