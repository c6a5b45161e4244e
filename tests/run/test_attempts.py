"""What the attempts of a run record about themselves."""

from __future__ import annotations

from pipeline.run.attempts import AttemptEnded
from pipeline.run.events import parse


def test_an_end_recorded_by_another_version_does_not_count_as_a_failure():
    ended = parse({"event": "ended", "attempt": 1})
    assert isinstance(ended, AttemptEnded)
    assert [name for name, value in ended.fields().items() if value] == ["attempt"]
