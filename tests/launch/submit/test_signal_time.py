"""How long before the time limit a job is told to stop: by what the run has measured, and checked at submission."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UsageError
from pipeline.launch.site import Site
from pipeline.launch.submit.signal_time import signal_time_s
from pipeline.run import journal
from pipeline.run.events import Checkpointed, StartBegan, Started, append
from pipeline.run.folder import Run
from tests.launch.support import SITE, FakeSlurm, make_run, submit, write_files


def site(minutes: int, **changes: Any) -> Site:
    return Site.model_validate({**SITE, "train": {"time_limit_min": minutes}, **changes})


def measured(run: Run, *, step_s: float, saves_s: list[float], startup_s: float) -> Run:
    """A run whose first attempt began at 1000 and logged thirty steps."""
    append(run.events_file, StartBegan(began=1000.0, time=1001.0))
    append(run.events_file, Started(time=1000.0 + startup_s))
    steps = [{"step": step, "time/step_s": 60.0 if step == 1 else step_s} for step in range(1, 31)]  # one compiles
    journal.replace(run.metrics_file, [journal.encode(step) for step in steps])
    for seconds in saves_s:
        append(run.events_file, Checkpointed(step=10, seconds=seconds))
    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made, _ = make_run(tmp_path, monkeypatch)
    return made


@pytest.mark.parametrize(("minutes", "seconds"), [(1, 15), (4, 60), (8, 120), (1440, 120)])
def test_before_anything_is_measured_it_is_a_quarter_of_the_limit_and_two_minutes_at_most(
    run: Run, minutes: int, seconds: int
):
    assert signal_time_s(run, site(minutes)) == seconds


def test_it_grows_with_the_step_and_with_the_longest_save(run: Run):
    measured(run, step_s=20.0, saves_s=[10.0, 40.0, 12.0], startup_s=50.0)
    assert signal_time_s(run, site(60)) == 2 * 20 + 1.5 * 40 + 15


def test_a_fast_run_is_still_given_half_a_minute(run: Run):
    measured(run, step_s=0.1, saves_s=[0.2], startup_s=5.0)
    assert signal_time_s(run, site(60)) == 30


def test_a_site_decides_itself_as_long_as_a_step_and_a_save_fit(run: Run):
    measured(run, step_s=20.0, saves_s=[40.0], startup_s=50.0)
    assert signal_time_s(run, site(60, signal_before_end_s=60)) == 60
    with pytest.raises(UsageError, match=r"signal_before_end_s: given 59, .*20 \+ 40 s.*allowed: 115 "):
        signal_time_s(run, site(60, signal_before_end_s=59))


def test_a_limit_that_start_up_and_save_use_up_is_refused(run: Run):
    measured(run, step_s=20.0, saves_s=[40.0], startup_s=100.0)
    assert signal_time_s(run, site(4)) == 115
    with pytest.raises(UsageError, match=r"train\.time_limit_min: given 3, .*100 s.*allowed: 5 "):
        signal_time_s(run, site(3))


def test_a_submission_hands_the_measured_time_to_slurm_and_refuses_one_that_cannot_be_met(
    run: Run, tmp_path: Path, slurm: FakeSlurm
):
    measured(run, step_s=20.0, saves_s=[40.0], startup_s=50.0)
    done = submit(tmp_path, slurm, "--dry-run")
    assert "#SBATCH --signal=USR2@115" in done.out
    write_files(tmp_path, site={**SITE, "signal_before_end_s": 30})
    done = submit(tmp_path, slurm)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "took 20 + 40 s" in done.err
    assert slurm.calls("sbatch") == []
