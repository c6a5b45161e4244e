"""The jobs that were submitted for a run, in `launch/jobs.json`; run/attempts.py knows what happened to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.files import write_json
from pipeline.launch.slurm import accounting
from pipeline.launch.slurm import client as slurm
from pipeline.run.attempts import Charged, Stage
from pipeline.run.folder import Run
from pipeline.run.records import read_checked


@dataclass(frozen=True)
class Job:
    """A job that was submitted for a run."""

    id: Annotated[str, Field(pattern=slurm.JOB_ID)]
    """`12`; `12_3` where the run is one task of a sweep's array."""
    stage: Stage
    tasks: Annotated[int, Field(ge=1, le=10**6)]
    """Tasks of an array job; 1 for a plain job."""
    submitted: Annotated[float, Field(ge=0, lt=1e11)]
    """In Unix seconds."""
    site: str
    """Name of the site."""
    accounting: bool
    """Whether sacct answers on the site."""
    shared: bool = False
    """Whether it also works for other runs of a sweep."""
    name: str = ""
    """Its name in the queue; empty for a job recorded by a version that did not record names."""

    def is_named(self, name: str) -> bool:
        """Whether Slurm's job of this name can be this one.

        The id alone does not tell: a new cluster starts counting ids again, and two clusters may share a file system.
        """
        return self.name in ("", name)

    def holds(self, task: str) -> bool:
        """Whether an id of Slurm's is this job's or that of one of its tasks."""
        return self.id in (task, slurm.base(task))


class _Jobs(TypedDict):
    jobs: list[Job]


_JOBS: TypeAdapter[_Jobs] = TypeAdapter(_Jobs)


def jobs(run: Run) -> list[Job]:
    """Returns every job of a run, oldest first."""
    return list(read_checked(run.jobs_file, run.path, _JOBS)["jobs"]) if run.jobs_file.exists() else []


def evaluation_jobs(run: Run) -> list[Job]:
    """Returns the jobs that evaluate checkpoints beside the chain of a run, oldest first."""
    file = run.evaluation_jobs_file
    return list(read_checked(file, run.path, _JOBS)["jobs"]) if file.exists() else []


def add_evaluation_job(run: Run, new: Job) -> None:
    """Records a job that evaluates a checkpoint; only the host of rank 0 submits them."""
    write_json(run.evaluation_jobs_file, {"jobs": [asdict(job) for job in [*evaluation_jobs(run), new]]})


def add_jobs(run: Run, new: list[Job]) -> None:
    """Records jobs that were just submitted."""
    write_json(run.jobs_file, {"jobs": [asdict(job) for job in [*jobs(run), *new]]})


def forget_jobs(run: Run, ids: set[str]) -> None:
    """Removes the records of jobs that were cancelled before they began."""
    known = jobs(run)
    kept = [job for job in known if job.id not in ids]
    if kept != known:  # a full disk must not fail a write that changes nothing
        write_json(run.jobs_file, {"jobs": [asdict(job) for job in kept]})


def last_chain(run: Run) -> list[Job]:
    """Returns the jobs of the last submission in the order of the stages."""
    found = jobs(run)
    newest = max((job.submitted for job in found), default=0.0)
    return [job for job in found if job.submitted == newest]


def charges(jobs: Iterable[Job]) -> list[Charged]:
    """Returns what Slurm's accounting says about every allocation of jobs that belong to one run only.

    Raises:
        SlurmError: Accounting does not answer.
    """
    own = [job for job in jobs if job.accounting and not job.shared]
    found = accounting.charges(job.id for job in own)
    return [row for name, row in found if any(job.holds(row.job) and job.is_named(name) for job in own)]
