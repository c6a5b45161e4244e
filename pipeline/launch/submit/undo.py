"""A chain of jobs is submitted as a whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run.folder import Run


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
        _take_back(runs, home, submitted, error)
        for run in (*runs, home):
            if run.path not in fresh:
                job_records.forget_jobs(run, {job.id for job in submitted})
        for folder in fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise PipelineError(
                f"{error.filename or home.path}: cannot be written ({error.strerror}); nothing was submitted. "
                "Make room, or choose another runs_dir"
            ) from error
        raise


def _take_back(runs: Sequence[Run], home: Run, submitted: list[Job], why: BaseException) -> None:
    known = [job.id for job in submitted]
    try:
        slurm.cancel(known)
    except slurm.SlurmError as error:
        # The jobs stay known, so that `pipeline cancel` finds them and no second chain is submitted beside them.
        for run in runs:
            job_records.add_jobs(run, submitted)
        raise PipelineError(
            f"Slurm went away in the middle of the submission and holds job {', '.join(known)} "
            f"({error}); `pipeline cancel {runs[0].path}` when `scontrol ping` answers again, then submit again"
        ) from error
    try:
        slurm.cancel(sorted(_unheard_of(home.launch) - set(known)))
    except slurm.SlurmError as error:
        if isinstance(why, PipelineError):  # sbatch itself has said that it took no more
            return
        raise PipelineError(
            f"{home.launch}: the submission was broken off ({why or type(why).__name__}), and Slurm does not say "
            f"whether it holds a job of it ({error}); look with `squeue --me` when `scontrol ping` answers again"
        ) from why


def _unheard_of(folder: Path) -> set[str]:
    """Jobs in the queue whose batch script is in this folder.

    submitit tells an id when it has moved its files: what happens between that and sbatch leaves a job behind that
    nobody knows.
    """
    rows = [
        line.partition("|") for line in slurm.call("squeue", "--me", "--noheader", "--format", "%F|%o").splitlines()
    ]
    return {job for job, _, script in rows if Path(script).parent.resolve() == folder.resolve()}
