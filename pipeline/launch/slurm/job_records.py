"""What the launcher remembers of a run: its jobs, and how each attempt began and ended.

`launch/jobs.json` is written when jobs are submitted; the jobs themselves append to `launch/attempts.jsonl`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.files import write_json
from pipeline.launch.slurm import client as slurm
from pipeline.run import events
from pipeline.run.events import Event, EventLog
from pipeline.run.folder import Run
from pipeline.run.records import read_checked

Stage = Literal["prepare", "train", "evaluate"]
STAGES: tuple[Stage, ...] = ("prepare", "train", "evaluate")


class AttemptEvent(Event):
    """Something that happened to an attempt, which is one allocation of a job."""

    stage: str = ""
    job: str = ""
    attempt: int = 0


class AttemptBegan(AttemptEvent, kind="began"):
    """The batch script of an attempt began."""

    nodes: str = ""
    """Slurm's short form of the node list."""


class AttemptEnded(AttemptEvent, kind="ended"):
    """The tasks of an attempt ended."""

    outcome: str = ""
    reason: str = ""
    code: int = 0
    """What srun returned."""
    progress: int = 0
    """The step of the newest checkpoint, or the number of finished slices."""
    lost: list[str] = field(default_factory=list)
    counts: bool = False
    """Whether it counts against `requeue.same_step_failures`."""


class RankEnded(AttemptEvent):
    """A rank ended without having finished."""

    rank: int = 0
    host: str = ""
    status: int = 0


class RankFailed(RankEnded, kind="rank_failed"):
    """A rank failed without having been asked to stop."""


class RankStopped(RankEnded, kind="rank_stopped"):
    """A rank stopped on request."""


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


def note(run: Run, event: AttemptEvent) -> None:
    """Appends what happened to an attempt."""
    run.attempts_file.parent.mkdir(parents=True, exist_ok=True)
    events.append(run.attempts_file, event)


def notes(run: Run, stage: Stage) -> EventLog:
    """Returns what happened to the attempts of a stage, in order."""
    return EventLog(n for n in EventLog.load(run.attempts_file).of(AttemptEvent) if n.stage == stage)
