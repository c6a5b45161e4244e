"""Preparing data in a job of a submitted run, with the events that tell goodput when it began and ended."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pipeline.config.sections import Config


@contextlib.contextmanager
def prepare_events(config: Config, part: str | None) -> Iterator[None]:
    """Records in a run's events when a job that prepares its data, or a part of it, began and ended.

    Outside a job, or without the events file of a submitted run, it records nothing.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        yield
        return
    # Making the events' dataclasses takes a twentieth of a short build, which has no use for them outside a job.
    from pipeline.run.events import PrepareBegan, PrepareEnded, append
    from pipeline.run.folder import run_for

    path = run_for(config).events_file
    if not path.exists():
        yield
        return
    append(path, PrepareBegan(slice=part, job=job))
    done = False
    try:
        yield
        done = True
    finally:
        append(path, PrepareEnded(slice=part, job=job, done=done))
