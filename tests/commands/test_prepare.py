"""A job that prepares data leaves events in the run that submitted it."""

from __future__ import annotations

import pytest

from pipeline.commands.prepare import prepare_events
from pipeline.run import journal
from pipeline.run.events import Submitted, append


def test_a_job_that_prepares_is_recorded_in_the_events_of_a_submitted_run_only(tmp_path, monkeypatch):
    file = tmp_path / "events.jsonl"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with prepare_events(file, None):
        assert not file.exists()
    append(file, Submitted())
    with prepare_events(file, "1/2"):
        pass
    with pytest.raises(ValueError), prepare_events(file, "2/2"):
        raise ValueError
    monkeypatch.delenv("SLURM_JOB_ID")
    with prepare_events(file, None):
        pass
    found = [(r["event"], r.get("slice"), r.get("done")) for r in (line.record for line in journal.read(file))]
    assert found == [
        ("submitted", None, None),
        ("prepare_began", "1/2", None),
        ("prepare_ended", "1/2", True),
        ("prepare_began", "2/2", None),
        ("prepare_ended", "2/2", False),
    ]
