"""How the backlog on disk is split into batches and rounds."""

import threading

import pytest

from pipeline.run import journal
from pipeline.tracking import upload_state
from pipeline.tracking.upload import uploader
from pipeline.tracking.upload.feed import Feed, lock_upload
from pipeline.tracking.upload.store import Store, resolve_uri
from tests.tracking.support import begin, log_steps, make_run, of_journal, of_mlflow, read_history, wait_for


def test_memory_does_not_grow_with_the_backlog(folder, monkeypatch):
    run, config = make_run(folder, "none")
    tracker = begin(run, config)
    line = {f"metric/{i}": float(i) for i in range(10)}
    with journal.Writer(run.metrics_file) as writer:
        writer.write(b"".join(journal.encode({"step": s, "time": float(s), **line}) for s in range(1, 5001)))
    tracker.close("FINISHED")
    sizes = []
    uri = resolve_uri(f"sqlite:///{folder}/mlflow.db")
    feed = Feed(run, config, uri)
    monkeypatch.setattr(Store, "send_points", lambda self, run_id, points: sizes.append(len(points)) or [])
    feed.send_all()
    assert sum(sizes) >= 50_000 and max(sizes) <= 1000


def test_lines_that_come_while_a_round_sends_wait_for_the_next_round(folder, monkeypatch):
    run, config = make_run(folder, "none")
    tracker = begin(run, config)
    for step in range(1, 21):
        tracker.log(step, {"train/loss": 1.0})
    feed = Feed(run, config, resolve_uri(f"sqlite:///{folder}/mlflow.db"))
    batches = []

    def training_goes_on(store, run_id, points):
        batches.append(len(points))
        tracker.log(20 + len(batches), {"train/loss": 1.0})
        assert len(batches) < 10, "the round continues as long as training does"
        return []

    monkeypatch.setattr(Store, "send_points", training_goes_on)
    assert feed.send_all() == 20
    assert feed.send_all() == 1
    assert batches == [20, 1]
    tracker.close("FINISHED")


def system_line(step):
    return journal.encode({"step": step, "time": 1000.0 + step, "system/n1/cpu": float(step)})


def test_system_metrics_are_durable_before_they_are_sent(folder, monkeypatch):
    run, config = make_run(folder, "none")
    file = run.tracking / "system" / "n1.jsonl"
    journal.replace(file, [system_line(0)])
    order = []
    monkeypatch.setattr(journal, "make_durable", order.append)
    monkeypatch.setattr(Store, "send_points", lambda self, run_id, points: order.append(points[0].key) or [])
    Feed(run, config, resolve_uri(f"sqlite:///{folder}/mlflow.db")).send_all()
    assert order == [file, "system/n1/cpu"]


def test_a_system_metrics_file_shorter_than_its_position_is_sent_from_its_start(folder):
    run, config = make_run(folder, "none")
    uri = resolve_uri(f"sqlite:///{folder}/mlflow.db")
    file = run.tracking / "system" / "n1.jsonl"
    journal.replace(file, map(system_line, range(10)))
    assert Feed(run, config, uri).send_all() == 10
    journal.replace(file, map(system_line, (0, 10)))
    assert Feed(run, config, uri).send_all() == 2
    feed = Feed(run, config, uri)
    store, run_id = feed.connect()
    assert [p.step for p in read_history(store, run_id)["system/n1/cpu"]] == list(range(11))


def test_an_identity_is_on_disk_before_the_mlflow_run_is_created(folder, monkeypatch):
    run, config = make_run(folder, "none")
    monkeypatch.setattr(Store, "ensure_run", lambda self, identity, *_: on_disk.append(identity) or "0")
    on_disk = []
    uri = resolve_uri(f"sqlite:///{folder}/mlflow.db")
    Feed(run, config, uri).connect()
    assert on_disk == [upload_state.load(run).identity]


def test_a_lock_that_cannot_be_taken_for_a_moment_does_not_end_the_uploader(folder, monkeypatch, caplog):
    run, config = make_run(folder)
    failures = [OSError(5, "Input/output error")]

    def lock(run):
        if failures:
            raise failures.pop()
        return lock_upload(run)

    monkeypatch.setattr("pipeline.tracking.upload.uploader.lock_upload", lock)
    tracker = begin(run, config)
    log_steps(tracker, 1, 10)
    wait_for(lambda: not failures, 30)
    tracker.close("FINISHED")
    assert of_mlflow(run, config) == of_journal(run)
    assert "Input/output error" in caplog.text


def test_sending_a_backlog_leaves_training_the_machine_most_of_the_time(folder, monkeypatch):
    run, config = make_run(folder)
    closing = threading.Event()
    monkeypatch.setattr(uploader, "_PAUSE_S", (2.0, 30.0))
    pauses = []
    monkeypatch.setattr(closing, "wait", pauses.append)
    sending = uploader.Uploader(run, config, resolve_uri(f"sqlite:///{folder}/mlflow.db"), closing)
    for took_s in (0.5, 1000.0):
        assert not sending._rest(took_s)
    assert pauses == [pytest.approx(2.0), 30.0]
