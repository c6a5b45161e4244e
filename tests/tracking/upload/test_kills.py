"""Real training that is killed, two runs at once, and a real server that disappears."""

import random
import socket
import sys
import time

import psutil
import pytest

from pipeline.checkpoint.layout import Manifest, published
from pipeline.errors import PipelineError
from pipeline.run import journal
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.upload.sync import sync
from pipeline.tracking.upload.ui import local_server
from tests import processes
from tests.tracking.support import (
    acknowledged,
    begin,
    config_text,
    feed,
    gate,
    make_run,
    of_journal,
    of_mlflow,
    open_store,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_helper")]


@pytest.fixture
def experiment(tmp_path):
    """Returns a config file with prepared data."""
    (tmp_path / "text").mkdir()
    sentence = "the people of this union have a right to peace and work in every state"
    chance = random.Random(0)
    for number in range(12):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(chance.choices(sentence.split(), k=400)))
    file = tmp_path / "experiment.yaml"
    file.write_text(config_text(tmp_path))
    processes.run(["prepare", str(file)], 1, tmp_path / "log")
    return file


def train(experiment, *overrides, **environment):
    return processes.start(["train", str(experiment), *overrides], 1, experiment.parent / "log", environment)


def finish(training, seconds=240):
    assert training.wait(seconds) and training.codes == {0: 0}, training.words()


def run_of(experiment):
    return Run(experiment.parent / "runs" / "try")


def last_step(run):
    newest = journal.last(run.metrics_file)
    return newest["step"] if newest else 0


def attempts(run):
    return upload_state.load(run).attempt if run.mlflow_file.exists() else 0


def sending(run):
    """Returns the bytes of metrics.jsonl that may have reached MLflow."""
    return upload_state.load(run).possibly_published() if run.mlflow_file.exists() else 0


def kill_once(experiment, settings, run, worst_moment, patience_s):
    """Starts training and kills it after new lines were written; at worst, after some were sent."""
    before = attempts(run)
    training = train(experiment, *settings)
    try:
        wait_for(lambda: training.poll() or attempts(run) > before, 240)
        began, fed = last_step(run), sending(run)

        def due():
            nonlocal fed
            fed = min(fed, sending(run))  # a resumed run has its position lowered first
            return sending(run) > fed if worst_moment else last_step(run) > began

        wait_for(lambda: training.poll() or due(), 240)
        time.sleep(patience_s)
        assert not training.poll(), training.words()
    finally:
        training.end()


@pytest.mark.timeout(900)
def test_after_ten_kills_mlflow_has_exactly_the_final_history(experiment):
    """Every second kill follows soon after points were sent, when a repeat could show."""
    run, chance = run_of(experiment), random.Random(7)
    settings = ["train.log_interval=5", "train.checkpoint_interval=60", "train.batch_size=32"]
    settings += ["train.micro_batch_size=32", "model.d_model=48"]
    for kill in range(10):
        kill_once(experiment, ["train.max_iters=1000000", *settings], run, kill % 2 == 1, chance.uniform(0.0, 1.5))
    last = last_step(run) // 5 * 5 + 200
    finish(train(experiment, f"train.max_iters={last}", *settings))
    sync(run)
    config = run.config()
    assert of_mlflow(run, config) == of_journal(run)
    assert [step for step, *_ in of_journal(run)["train/loss"]] == [1, *range(5, last + 1, 5)]
    store, run_id = open_store(run, config)
    there = store.read_run(run_id)
    assert there.info.status == "FINISHED"
    runs = store._client.search_runs([there.info.experiment_id])
    assert len(runs) == 1, "one MLflow run for one pipeline run"
    assert Manifest.load(published(run.checkpoints)[0]).state["mlflow_run_id"] == run_id
    assert upload_state.load(run).retries == []
    starts = [line.record for line in journal.read(run.events_file) if line.record["event"] == "attempt"]
    assert len(starts) == 11 and any(s["reached"] > s["step"] for s in starts), "steps were repeated"


def test_two_runs_that_make_and_fill_one_sqlite_file_at_once_lose_nothing(experiment):
    both = [train(experiment, f"name={name}", "train.log_interval=1") for name in ("one", "two")]
    for training in both:
        finish(training)
    for name in ("one", "two"):
        run = Run(experiment.parent / "runs" / name)
        assert sync(run).status == "FINISHED"
        assert of_mlflow(run, run.config()) == of_journal(run)
        assert len(of_journal(run)["train/loss"]) == 300


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with local_server(f"sqlite:///{tmp_path_factory.mktemp('server')}/server.db", processes.free_port()) as started:
        yield started


def port_of(server):
    return int(server.url.rpartition(":")[2])


def test_a_server_that_returns_after_a_while_receives_the_backlog(server, tmp_path, capfd):
    with gate(port_of(server)) as door:
        run, config = make_run(tmp_path, door.url)
        tracker = begin(run, config)
        feed(tracker, 1, 20, 0.02)
        wait_for(lambda: acknowledged(run) > 0, 180)
        door.shut()
        before = acknowledged(run)
        feed(tracker, 21, 200, 0.02)
        assert acknowledged(run) <= before + 4096
        door.open = True
        wait_for(lambda: acknowledged(run) == run.metrics_file.stat().st_size, 180)  # without `pipeline sync`
        feed(tracker, 201, 210, 0.01)
        tracker.close("FINISHED")
        assert of_mlflow(run, config) == of_journal(run)
        assert len(of_journal(run)["train/loss"]) == 210
    told = capfd.readouterr().err
    assert told.count("Training continues") == 1 and told.count("answers again") == 1


@pytest.mark.timing
def test_a_server_that_accepts_and_never_answers_delays_no_step(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(120)
        run, config = make_run(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracker = begin(run, config)
        connection, _ = silent.accept()
        with connection:
            assert feed(tracker, 1, 200, 0.02) < 1.0
            tracker.close("STOPPED")


def test_a_server_that_answers_after_seconds_gets_every_point(server, tmp_path):
    with gate(port_of(server)) as door:
        run, config = make_run(tmp_path, door.url, "name=slow")
        door.delay_s = 3.0
        tracker = begin(run, config)
        feed(tracker, 1, 100, 0.02)
        tracker.close("STOPPED")
        door.delay_s = 0.0
        sync(run)
        assert of_mlflow(run, config) == of_journal(run)
        store, run_id = open_store(run, config)
        experiments = [store.read_run(run_id).info.experiment_id]
        runs = store._client.search_runs(experiments, "attributes.run_name = 'slow'")
        assert len(runs) == 1


def test_without_any_server_training_ends_well_and_sync_fills_it_completely(experiment, tmp_path):
    port = processes.free_port()
    url = f"http://127.0.0.1:{port}"
    run = run_of(experiment)
    secret = {"MLFLOW_TRACKING_USERNAME": "ada-lovelace", "MLFLOW_TRACKING_PASSWORD": "difference-engine"}
    training = train(experiment, f"tracking.uri={url}", **secret)
    finish(training)
    told = training.log.read_text()
    assert told.count("Training continues") == 1 and f"pipeline sync {run.path}" in told
    with pytest.raises(PipelineError):
        sync(run)
    with local_server(f"sqlite:///{tmp_path}/server.db", port):
        processes.run(["sync", str(run.path)], 1, tmp_path / "log")
        assert of_mlflow(run, run.config()) == of_journal(run)
        store, run_id = open_store(run, run.config())
        there = store.read_run(run_id)
        assert there.info.status == "FINISHED" and there.data.params["model.d_model"] == "16"
        names = {f.path for f in store._client.list_artifacts(run_id)}
        assert {"config.yaml", "tokenizer.json", "environment.txt", "provenance.json", "checkpoints.json"} <= names
    for file in [training.log, *(f for f in run.path.rglob("*") if f.is_file())]:
        assert not any(word in file.read_bytes() for word in (b"difference-engine", b"ada-lovelace")), file


def test_a_killed_run_is_reported_to_mlflow_at_once_and_leaves_no_process(experiment):
    run = run_of(experiment)
    training = train(experiment, "train.max_iters=100000")
    try:
        wait_for(lambda: run.mlflow_file.exists() and acknowledged(run) > 0, 180)
        children = psutil.Process(training.processes[0].pid).children(recursive=True)
        assert children
    finally:
        training.end()
    psutil.wait_procs(children, timeout=30)
    assert not [p for p in children if p.is_running()]
    store, run_id = open_store(run, run.config())
    assert store.read_run(run_id).info.status == "KILLED"
    assert of_mlflow(run, run.config()) == of_journal(run)


def train_without_mlflow(experiment):
    try:
        processes.command(["train", experiment, "train.max_iters=30"])
    finally:
        assert "mlflow" not in sys.modules


def test_training_does_not_import_mlflow(experiment):
    finish(processes.fork(train_without_mlflow, (str(experiment),), 1, experiment.parent / "log"))
    assert sync(run_of(experiment)).status == "FINISHED"
