"""The whole chain of jobs in the real Apptainer image, on two nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.files import sha256_file
from pipeline.run.folder import Run
from tests import experiment
from tests.cluster.support import Cluster, open_cluster
from tests.cluster.training import start
from tests.container.support import cpu_image

_STEPS = 60

# The first test that needs the image builds it.
pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def image() -> Path:
    return cpu_image()


def test_the_chain_runs_in_the_image_and_is_one_mlflow_run(cluster: Cluster, image: Path) -> None:
    from mlflow.tracking import MlflowClient

    own = open_cluster(cluster.settings.state, cluster.work / "container")
    store = f"sqlite:///{own.work}/mlflow.db"
    settings = [f"train.max_iters={_STEPS}", f"container.image={image}", f"tracking.uri={store}"]
    run = start(own, "contained", *settings, f"tracking.artifact_location={own.work}/mlartifacts")
    run.wait_for_end("evaluate", 400)
    states = {stage: own.show(run.job(stage))["JobState"] for stage in ("prepare", "train", "evaluate")}
    assert set(states.values()) == {"COMPLETED"}, run.words()
    assert len(own.nodes_of(run.job("train"))) == 2
    assert [step for step, _ in experiment.curve(run.run)] == list(range(1, _STEPS + 1))
    used = {"path": str(image), "sha256": sha256_file(image), "code": "snapshot"}
    assert [start["image"] for start in Run(run.run).provenance()] == [used]
    assert (run.run / "report.html").exists()
    client = MlflowClient(store)
    (tracked,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert (tracked.info.run_name, tracked.info.status) == ("contained", "FINISHED")
    assert len(client.get_metric_history(tracked.info.run_id, "train/loss")) == _STEPS
