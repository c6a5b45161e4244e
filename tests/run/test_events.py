"""Events: what is written is what is read, and what other versions wrote is not lost."""

from __future__ import annotations

import json

import pytest

from pipeline.run.events import (
    Checkpointed,
    CheckpointFailed,
    EventLog,
    Failed,
    Finished,
    GaveUp,
    Requeued,
    StartBegan,
    Submitted,
    UnknownEvent,
    append,
    event,
    parse,
)  # fmt: skip

KINDS = sorted(event._KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_as_it_was_written(tmp_path, kind):
    file = tmp_path / "events.jsonl"
    written = append(file, event._KINDS[kind]())
    assert EventLog.load(file) == (written,)
    assert json.loads(file.read_text())["event"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_another_version_did_not_write_is_empty(kind):
    assert [name for name, value in parse({"event": kind}).fields().items() if value] == []


def test_an_optional_field_is_written_only_where_it_has_a_value():
    assert Finished(step=3).record() == {"time": 0.0, "event": "finished", "step": 3}
    assert Finished(step=3, stall_s=0.5).record()["stall_s"] == 0.5
    assert StartBegan().record()["job"] is None and CheckpointFailed().record()["error"] is None


def test_a_kind_and_fields_of_another_version_are_kept_or_left_out():
    strange = parse({"time": 5.0, "event": "teleported", "to": "mars"})
    assert isinstance(strange, UnknownEvent)
    assert (strange.name, strange.fields(), strange.time) == ("teleported", {"to": "mars"}, 5.0)
    assert parse({"event": "finished", "step": 2, "colour": "red"}) == Finished(step=2)


def test_the_time_is_that_of_writing_unless_it_is_given(tmp_path):
    file = tmp_path / "events.jsonl"
    assert append(file, Submitted()).time > 1e9
    assert append(file, Submitted(time=7.0)).time == 7.0


def test_a_submission_begins_a_new_account_and_a_requeue_follows_an_end():
    log = EventLog(
        [Submitted(), Failed(time=1), Submitted(time=2), GaveUp(time=3), Requeued(time=4), Checkpointed(time=5)]
    )
    assert [event.time for event in log.since_submission()] == [2, 3, 4, 5]
    assert [event.kind for event in log.ends()] == ["gave_up", "requeued"]
    assert log.last(GaveUp, Failed) == GaveUp(time=3) and log.last(Finished) is None
    assert [event.time for event in log.since(4)] == [4, 5]
    assert log.of(Failed, Submitted) == [Submitted(), Failed(time=1), Submitted(time=2)]
