"""A run is not trained twice at a time, unless the user insists."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from pipeline.commands.other_start import refuse_other_start
from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.launch.slurm.job_records import Job, add_jobs
from pipeline.run.events import StartBegan, append
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from tests.launch.conftest import slurm as slurm
from tests.launch.support import FakeSlurm, make_run


@pytest.fixture
def made(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Config]:
    run, config = make_run(tmp_path, monkeypatch)
    run.tracking.mkdir(exist_ok=True)
    return run, config


def test_a_live_start_is_named_with_its_place_and_its_last_sign_of_life(made: tuple[Run, Config]) -> None:
    run, config = made
    refuse_other_start(config)
    append(run.events_file, StartBegan(number=1, host=socket.gethostname(), job="12"))
    ago = time.time() - 200
    os.utime(run.events_file, (ago, ago))

    def begin(state: upload_state.State) -> None:
        state.attempt += 1

    upload_state.update(run, begin)
    alive = upload_state.hold_alive(run, 1)
    with pytest.raises(UsageError, match=rf"{socket.gethostname()} in job 12 .*3:2\d ago.*--take-over"):
        refuse_other_start(config)
    os.close(alive)
    refuse_other_start(config)


def test_a_queued_job_of_the_run_is_named(made: tuple[Run, Config], slurm: FakeSlurm) -> None:
    run, config = made
    add_jobs(run, [Job("102", "train", 1, 1.0, "here", False, name="tiny-train")])
    refuse_other_start(config)
    slurm.says("squeue", "102|PENDING|Priority|||tiny-train\n")
    with pytest.raises(UsageError, match="job 102.*--take-over"):
        refuse_other_start(config)
    slurm.says("squeue", err="squeue: error: Unable to contact slurm controller\n", status=1)
    refuse_other_start(config)
