"""Whatever happens to a training job on two nodes, its run ends with the loss curve of an undisturbed one.

Recovery needs no manual intervention: each test causes one failure and then only waits.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from pipeline.run.folder import Run
from pipeline.tracking.upload.sync import sync
from tests import experiment
from tests.cluster import training
from tests.cluster.support import Cluster, Figures
from tests.cluster.training import (
    CHECKPOINT_INTERVAL,
    MIDDLE,
    STEPS,
    Training,
    assert_same_beginning,
    assert_same_training,
    now,
    start,
)

# The first test waits for the whole chain, the last for a run that reaches its time limit several times.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def reference(cluster: Cluster) -> Training:
    """The whole chain, undisturbed: prepare, train, evaluate."""
    whole = start(cluster, "undisturbed", f"tracking.uri=sqlite:///{cluster.work}/mlflow.db")
    whole.wait_for_end("evaluate", 600)
    return whole


@pytest.fixture(scope="module")
def limited(cluster: Cluster, reference: Training) -> Training:
    """A run with a time limit of two minutes on two nodes with a slow network: it reaches the limit several times.

    It trains while other tests disturb runs on the other nodes.
    """
    slow = cluster.nodes[3:]
    cluster.slow_down(slow, megabits=2)  # 0.6 s per step: the run takes longer than two attempts
    site = {"time_limit_min": 2, "partition": "main"}
    return start(
        cluster, "limited", train=site, signal_before_end_s=15, extra_sbatch={"exclude": ",".join(cluster.nodes[:3])}
    )


@pytest.fixture
def submit(cluster: Cluster, limited: Training) -> Iterator[Callable[..., Training]]:
    """Submits a run on the nodes that `limited` does not use and waits until it is in the middle of training."""
    started: list[Training] = []

    def submit_and_wait(name: str, **train: object) -> Training:
        run = start(cluster, name, train=train, extra_sbatch={"exclude": ",".join(cluster.nodes[3:])})
        started.append(run)
        run.wait_for_step(MIDDLE)
        return run

    yield submit_and_wait
    for run in started:  # their evaluation would test nothing new
        cluster.run("scancel", *(run.job(stage) for stage in ("train", "evaluate")))


def test_prepare_array_training_on_two_nodes_and_evaluation_are_one_mlflow_run(
    cluster: Cluster, reference: Training
) -> None:
    from mlflow.tracking import MlflowClient

    states = {stage: cluster.show(reference.job(stage))["JobState"] for stage in ("prepare", "train", "evaluate")}
    assert set(states.values()) == {"COMPLETED"}, reference.words()
    assert reference.events("started")[0]["world_size"] == 2
    assert len(cluster.nodes_of(reference.job("train"))) == 2
    assert [step for step, _ in experiment.curve(reference.run)] == list(range(1, STEPS + 1))
    assert (reference.run / "evaluation.json").exists()
    assert (reference.run / "report.html").exists()
    client = MlflowClient(f"sqlite:///{cluster.work}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert [(r.info.run_name, r.info.status) for r in runs] == [("undisturbed", "FINISHED")]
    assert len(client.get_metric_history(runs[0].info.run_id, "train/loss")) == STEPS


def test_preemption_loses_no_step(
    cluster: Cluster, reference: Training, submit: Callable[..., Training], figures: Figures
) -> None:
    run = submit("preempted", partition="low")
    nodes = cluster.nodes_of(run.job("train"))
    failed_at = now()
    cluster.sbatch("sleep 2", "--partition=high", "--exclusive", f"--nodelist={','.join(nodes)}")
    ended = run.wait_for_end("train")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.words()
    (stopped,) = run.events("preempted")
    saved = next(e for e in run.events("checkpointed") if e["step"] == stopped["step"])
    assert [e["step"] for e in run.events("resumed")] == [stopped["step"]]
    assert_same_training(run.run, reference.run)
    figures.add("a job in `high` is submitted -> the preempted run's checkpoint is durable", saved["time"] - failed_at)
    figures.add("a job in `high` is submitted -> first new step", run.new_step_after(failed_at) - failed_at)


def test_scontrol_requeue_loses_no_step(
    cluster: Cluster, reference: Training, submit: Callable[..., Training], figures: Figures
) -> None:
    run = submit("requeued")
    failed_at = now()
    cluster.run("scontrol", "requeue", run.job("train"))
    ended = run.wait_for_end("train")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.words()
    (stopped,) = run.events("preempted")
    saved = next(e for e in run.events("checkpointed") if e["step"] == stopped["step"])
    assert [e["step"] for e in run.events("resumed")] == [stopped["step"]]
    assert_same_training(run.run, reference.run)
    figures.add("scontrol requeue, a signal at once -> the checkpoint is durable", saved["time"] - failed_at)
    figures.add("scontrol requeue, a signal at once -> first new step", run.new_step_after(failed_at) - failed_at)


def test_a_killed_rank_starts_again_on_its_node_and_elsewhere_once_that_is_drained(
    cluster: Cluster, reference: Training, submit: Callable[..., Training], figures: Figures
) -> None:
    run = submit("rank-killed")
    job = run.job("train")
    nodes = cluster.nodes_of(job)
    second = nodes[1]

    def kill() -> float:
        (rank,) = training.processes_of(cluster, second, "pipeline train")
        os.kill(rank, signal.SIGKILL)
        return now()

    first_at = kill()
    run.wait_for(lambda: len(run.events("resumed")) == 1, 120, "no second attempt")
    run.wait_for_step(MIDDLE + CHECKPOINT_INTERVAL)
    assert (cluster.show(job)["Restarts"], cluster.nodes_of(job)) == ("0", nodes), run.words()
    figures.add("SIGKILL of a rank -> first new step", run.new_step_after(first_at) - first_at)

    cluster.run("scontrol", "update", f"NodeName={second}", "State=DRAIN", "Reason=health check")
    failed_at = kill()
    try:
        ended = run.wait_for_end("train")
    finally:
        cluster.run("scontrol", "update", f"NodeName={second}", "State=RESUME")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.words()
    excluded = cluster.run("scontrol", "show", "hostnames", ended["ExcNodeList"]).split()
    assert sorted(excluded) == sorted([second, *cluster.nodes[3:]])
    for kind in ("restarted", "requeued"):
        (event,) = run.events(kind)
        assert f"rank 1 on {second}" in event["reason"]
    assert_same_training(run.run, reference.run)
    waited = run.new_step_after(failed_at) - failed_at
    figures.add("SIGKILL of a rank on a node that is drained -> first new step", waited)


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_node_that_loses_power_is_replaced(
    cluster: Cluster, reference: Training, submit: Callable[..., Training], figures: Figures, which: str
) -> None:
    run = submit(f"lost-{which}")
    lost = cluster.nodes_of(run.job("train"))[["first", "second"].index(which)]
    failed_at = now()
    cluster.kill_node(lost)
    try:
        ended = run.wait_for_end("train")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), run.words()
        assert lost not in cluster.nodes_of(run.job("train"))
    finally:
        cluster.start_node(lost)
    assert [e["nodes"] for e in run.events("node_lost")] == [[lost]]
    assert_same_training(run.run, reference.run)
    figures.add(f"power failure of the {which} node -> first new step", run.new_step_after(failed_at) - failed_at)


def test_training_continues_while_the_controller_restarts(
    cluster: Cluster, reference: Training, submit: Callable[..., Training]
) -> None:
    run = submit("controller")
    cluster.restart_controller()
    ended = run.wait_for_end("train")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), run.words()
    assert_same_training(run.run, reference.run)


def test_a_start_that_lost_the_run_ends_within_seconds_and_is_not_requeued(
    cluster: Cluster, reference: Training, submit: Callable[..., Training], figures: Figures
) -> None:
    """A job loses it to its own next attempt, because its node only seemed lost, and that one to a start by hand."""
    run = submit("superseded", nodes=1, tasks_per_node=2, mem_gb=3)
    job = run.job("train")
    (first,) = cluster.nodes_of(job)
    cluster.slow_down(cluster.nodes[:3], 2, "lo")  # 0.6 s per step: each attempt still trains when the next one starts
    with cluster.cut_off(first):
        run.wait_for(lambda: len(run.events("resumed")) > 0, 120, "no second attempt")
        taken = [run.events("attempt")[1]["time"]]
        assert (run.events("attempt")[1]["job"], run.events("attempt")[1]["restart"]) == (job, 1)
        run.wait_for(lambda: len(run.ended(job)) > 0, 60, "the first attempt still runs")
        second = cluster.nodes_of(job)
        assert second != [first] and cluster.show(job)["JobState"] == "RUNNING", run.words()

        refused = run.pipeline("train", str(run.config), *run.overrides)
        assert refused.returncode == EXIT_USAGE and cluster.show(job)["JobState"] == "RUNNING", run.words()
        by_hand = run.train_here("--take-over")
        ended = run.wait_for_end("train", 120)
        assert by_hand.wait(240) == EXIT_OK, run.words()
    taken.append(run.events("attempt")[2]["time"])
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{EXIT_FAILED}:0", "1"), run.words()
    for number, (began, note) in enumerate(zip(taken, run.ended(job), strict=True)):
        assert note["attempt"] == number and note["time"] - began < 30
        figures.add(f"a run is taken over -> attempt {number} of its job has ended", note["time"] - began)
    assert not [
        kind for kind in ("failed", "checkpoint_failed", "preempted", "requeued", "gave_up") if run.events(kind)
    ]
    assert experiment.lines(run.run / "events.jsonl")[-1]["event"] == "finished"
    assert json.loads(run.pipeline("status", str(run.run), "--json").stdout)[0]["state"] == "finished"
    assert_same_training(run.run, reference.run)


def test_a_cancelled_run_stays_cancelled_until_it_is_submitted_again(
    cluster: Cluster, reference: Training, submit: Callable[..., Training]
) -> None:
    run = submit("cancelled")
    job, evaluation = run.job("train"), run.job("evaluate")
    cluster.run("scancel", job)
    ended = run.wait_for_end("train")
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), run.words()
    run.wait_for(lambda: cluster.show(evaluation)["JobState"] == "CANCELLED", 30, "the evaluation is not cancelled")
    assert [e["job"] for e in run.events("cancelled")] == [job]
    assert sync(Run(run.run)).status == "KILLED"
    assert_same_beginning(run.run, reference.run)
    run.submit()
    assert run.wait_for_end("train")["JobState"] == "COMPLETED", run.words()
    assert_same_training(run.run, reference.run)


def test_a_time_limit_reached_several_times_loses_no_step(
    limited: Training, reference: Training, figures: Figures
) -> None:
    ended = limited.wait_for_end("train", 600)
    assert ended["JobState"] == "COMPLETED", limited.words()
    stops = limited.events("preempted")
    assert len(stops) >= 2
    # On a busy machine the signal may arrive before an attempt has trained; then there is nothing to save.
    assert int(ended["Restarts"]) == len(limited.events("requeued")) >= len(stops)
    assert [e["step"] for e in limited.events("resumed")] == [e["step"] for e in stops]
    assert_same_training(limited.run, reference.run)
