"""Refuses to train a run that another start trains, or that a job in the queue is about to train."""

from __future__ import annotations

import contextlib
import time

from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.launch.slurm import client as slurm
from pipeline.launch.submit.admission import refuse_active
from pipeline.run.events import EventLog, StartBegan
from pipeline.run.folder import Run, run_for
from pipeline.text_format import duration
from pipeline.tracking.upload.sync import is_alive, last_sign

_CURE = "or take the run over, which ends the other start: pipeline train --take-over"


def refuse_other_start(config: Config) -> None:
    """Refuses a run with a live start or a queued job: the one that began first could save nothing from then on.

    Raises:
        UsageError: There is one; the message says who, where, and when it last gave a sign of life.
    """
    run = run_for(config)
    if not run.config_file.exists():
        return
    events = EventLog.load(run.events_file)
    if is_alive(run, events):
        raise UsageError(f"{run.path}: is being trained {_where(run, events)}; wait for it or stop it, {_CURE}")
    if not slurm.installed():
        return
    try:
        with contextlib.suppress(slurm.SlurmError):  # training here does not depend on Slurm
            refuse_active([run], run)
    except UsageError as error:
        raise UsageError(f"{error}, {_CURE}") from error


def _where(run: Run, events: EventLog) -> str:
    start = events.last(StartBegan)
    job = f" in job {start.job}" if start is not None and start.job else ""
    host = f"on {start.host}{job}" if start is not None else "by another process"
    return f"{host} (last sign of life {duration(max(0.0, time.time() - last_sign(run)))} ago)"
