"""A chain of jobs is submitted as a whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence

from pipeline.errors import PipelineError
from pipeline.launch import records, slurm
from pipeline.launch.records import Job
from pipeline.run import Run


@contextlib.contextmanager
def taken_back_on_failure(runs: Sequence[Run], home: Run) -> Iterator[list[Job]]:
    """Collects jobs; after a failure, or Ctrl-C, none of them is left, nor a run folder that was not there before.

    Args:
        runs: What is submitted.
        home: Where the files of the jobs are: the run, or a folder for the whole sweep.

    Raises:
        PipelineError: A disk is full, or Slurm has gone meanwhile and still holds jobs.
    """
    fresh = [run.path for run in (*runs, home) if not run.path.exists()]
    submitted: list[Job] = []
    try:
        yield submitted
    except BaseException as error:
        _take_back(runs, submitted)
        for run in runs:
            if run.path not in fresh:
                records.forget_jobs(run, {job.id for job in submitted})
        for folder in fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise PipelineError(
                f"{error.filename or home.path}: cannot be written ({error.strerror}); nothing was submitted. "
                "Make room, or choose another runs_dir"
            ) from error
        raise


def _take_back(runs: Sequence[Run], submitted: list[Job]) -> None:
    try:
        slurm.cancel(job.id for job in submitted)
    except slurm.SlurmError as error:
        # The jobs stay known, so that `pipeline cancel` finds them and no second chain is submitted beside them.
        for run in runs:
            records.add_jobs(run, submitted)
        raise PipelineError(
            f"Slurm went away in the middle of the submission and holds job {', '.join(job.id for job in submitted)} "
            f"({error}); `pipeline cancel {runs[0].path}` when `scontrol ping` answers again, then submit again"
        ) from error
