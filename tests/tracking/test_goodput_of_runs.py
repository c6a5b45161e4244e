"""What trackers write is what goodput reads, and `status` shows it."""

import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipeline.launch.watch.status import statuses
from pipeline.launch.watch.status_view import view
from pipeline.run import journal
from pipeline.run.events import (
    Checkpointed,
    EventLog,
    Finished,
    Preempted,
    Repeating,
    Resumed,
    Started,
    Submitted,
    append,
)
from pipeline.tracking.goodput import goodput
from tests.tracking.support import begin, make_run
from tests.tracking.test_goodput import attempt, event


def test_a_tracker_writes_the_events_that_goodput_needs(tmp_path):
    run, config = make_run(tmp_path, "none")
    append(run.events_file, Submitted())
    tracker = begin(run, config)
    tracker.event(Started())
    for step in range(1, 11):
        tracker.log(step, {"train/loss": 1.0, "time/checkpoint_stall_s": 0.25 if step == 5 else 0.0})
        if step == 6:
            tracker.event(Checkpointed(step=5))
    tracker.event(Preempted())
    tracker.close("STOPPED")
    tracker = begin(run, config, 5)
    tracker.event(Resumed())
    for step in range(6, 12):
        tracker.log(step, {"train/loss": 1.0})
    tracker.rewind(8)
    tracker.log(9, {"train/loss": 1.0})
    tracker.event(Finished())
    tracker.close("FINISHED")
    kinds = [line.record["event"] for line in journal.read(run.events_file)]
    assert kinds == [
        "submitted", "attempt", "started", "checkpointed", "preempted",
        "attempt", "resumed", "caught_up", "repeating", "finished",
    ]  # fmt: skip
    stalls = [line.record.get("stall_s") for line in journal.read(run.events_file)]
    assert stalls == [None, None, None, 0.25, 0.0, None, None, None, None, 0.0]
    attempts = [line.record for line in journal.read(run.events_file) if line.record["event"] == "attempt"]
    assert [(a["number"], a["step"], a["reached"]) for a in attempts] == [(1, 0, 0), (2, 5, 10)]
    found = goodput(run, EventLog.load(run.events_file))
    assert found.queue_s == 0 and found.startup_s > 0  # this process began long before the run was submitted


def test_a_rollback_to_the_newest_step_repeats_nothing(tmp_path):
    run, config = make_run(tmp_path, "none")
    tracker = begin(run, config)
    tracker.log(1, {"train/loss": 1.0})
    tracker.rewind(1)
    tracker.close("FINISHED")
    assert not EventLog.load(run.events_file).of(Repeating)


def test_status_shows_goodput_as_text_and_as_json(tmp_path, capsys):
    run, _ = make_run(tmp_path, "none")
    events = [event(0, "submitted"), attempt(60, 70), event(75, "started"), event(175, "finished", step=300)]
    run.events_file.write_bytes(b"".join(map(journal.encode, events)))
    (found,) = statuses([run])
    Console(width=100).print(view([found]))
    assert "57.1% of 2:55 (queue 1:00, startup 0:15, training 1:40)" in capsys.readouterr().out
    assert {k: v for k, v in found.to_json()["wall"].items() if v} == {
        "queue_s": 60,
        "startup_s": 15,
        "training_s": 100,
    }


def test_status_counts_the_time_a_run_waits(tmp_path, monkeypatch):
    run, _ = make_run(tmp_path, "none")
    append(run.events_file, Submitted())
    monkeypatch.setattr(
        "pipeline.launch.watch.status._known",
        lambda *_: SimpleNamespace(state="queued", reason="", stage="train", job="7", nodes=""),
    )
    monkeypatch.setattr("time.time", lambda real=time.time: real() + 600)
    assert statuses([run])[0].wall.queue_s == pytest.approx(600, abs=30)
