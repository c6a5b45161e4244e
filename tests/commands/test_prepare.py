"""A job that prepares data leaves events in the run that submitted it."""

from __future__ import annotations

import pytest

from pipeline.commands.prepare import prepare_events
from pipeline.run import journal
from pipeline.run.events import Submitted, append
from pipeline.run.folder import run_for
from tests.train.tiny import tiny


def test_a_job_that_prepares_is_recorded_in_the_events_of_a_submitted_run_only(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    file = run_for(config).events_file
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with prepare_events(config, None):
        assert not file.exists()
    file.parent.mkdir(parents=True)
    append(file, Submitted())
    with prepare_events(config, "1/2"):
        pass
    with pytest.raises(ValueError), prepare_events(config, "2/2"):
        raise ValueError
    monkeypatch.delenv("SLURM_JOB_ID")
    with prepare_events(config, None):
        pass
    found = [(r["event"], r.get("slice"), r.get("done")) for r in (line.record for line in journal.read(file))]
    assert found == [
        ("submitted", None, None),
        ("prepare_began", "1/2", None),
        ("prepare_ended", "1/2", True),
        ("prepare_began", "2/2", None),
        ("prepare_ended", "2/2", False),
    ]
