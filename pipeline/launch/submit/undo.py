"""Undoes a submission that failed: a chain of jobs is submitted as a whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import discard, naming
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run.folder import Run


@contextlib.contextmanager
def undone_on_failure(runs: Sequence[Run], home: Run) -> Iterator[list[Job]]:
    """Collects submitted jobs; on failure or Ctrl-C cancels them and removes the run folders made for them.

    Raises:
        PipelineError: A disk is full, or Slurm no longer answers and still holds jobs.
    """
    fresh = [run.path for run in (*runs, home) if not run.path.exists()]
    submitted: list[Job] = []
    try:
        yield submitted
    except BaseException as error:
        _cancel(runs, home, submitted, error)
        for run in (*runs, home):
            if run.path not in fresh:
                job_records.forget_jobs(run, {job.id for job in submitted})
        for folder in fresh:
            discard(folder)
        if isinstance(error, OSError):
            place, cure = error.filename or home.path, "nothing was submitted. Make room, or choose another runs_dir"
            with naming(place, "cannot be written", cure):
                raise
        raise


def _cancel(runs: Sequence[Run], home: Run, submitted: list[Job], why: BaseException) -> None:
    known = [job.id for job in submitted]
    try:
        slurm.cancel(known)
    except slurm.SlurmError as error:
        # The jobs stay recorded: `pipeline cancel` finds them, and no second chain can be submitted beside them.
        for run in runs:
            job_records.add_jobs(run, submitted)
        raise PipelineError(
            f"Slurm stopped answering in the middle of the submission and still holds job {', '.join(known)} "
            f"({error}); when `scontrol ping` answers, run `pipeline cancel {runs[0].path}` and submit again"
        ) from error
    try:
        slurm.cancel(sorted(_unreported({run.launch.resolve() for run in (*runs, home)}) - set(known)))
    except slurm.SlurmError as error:
        if isinstance(why, PipelineError):  # sbatch itself has refused the job
            return
        raise PipelineError(
            f"{home.launch}: the submission was interrupted ({why or type(why).__name__}), and Slurm does not say "
            f"whether it holds a job of it ({error}); check `squeue --me` when `scontrol ping` answers"
        ) from why


def _unreported(folders: set[Path]) -> set[str]:
    """Returns the ids of queued jobs whose batch script is in one of these folders.

    submitit reports an id only after moving its files: a failure between sbatch and that leaves an unknown job behind.
    """
    listed = slurm.call("squeue", "--me", "--noheader", "--format", "%F|%o").splitlines()
    rows = [line.partition("|") for line in listed]
    return {job for job, _, script in rows if Path(script).parent.resolve() in folders}
