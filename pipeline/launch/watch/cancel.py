"""`pipeline cancel`: cancels the jobs of a run and records that in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.launch.job.evaluations import unpin_evaluated
from pipeline.launch.job.rank import record_cancelled
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run.folder import Run


def cancel(run: Run) -> list[str]:
    """Cancels the waiting and running jobs of a run and returns their ids.

    Training saves before it ends, as far as the cluster's KillWait allows; nothing is requeued. The prepare array of a
    sweep is cancelled with the last of its runs.

    Raises:
        SlurmError: Slurm does not answer.
    """
    known, beside = job_records.jobs(run), job_records.evaluation_jobs(run)
    queue = slurm.names_in_queue(job.id for job in (*known, *beside))
    own = [job for job in known if not job.shared and _is_queued(job, queue)]
    left = {task: name for task, name in queue.items() if not any(job.holds(task) for job in own)}
    shared = [job for job in known if job.shared and _is_queued(job, queue) and not _is_waited_for(job, known, left)]
    ids = [job.id for job in known if job in own or job in shared]
    evaluations = [job.id for job in beside if _is_queued(job, queue)]
    slurm.cancel([*evaluations, *ids])
    unpin_evaluated(run)
    for job_id in ids:
        record_cancelled(run.events_file, job_id)
    return [*ids, *evaluations]


def _is_queued(job: Job, queue: Mapping[str, str]) -> bool:
    """Whether a job or one of its tasks is in the queue, under its id and its name."""
    return any(job.holds(task) and job.is_named(name) for task, name in queue.items())


def _is_waited_for(shared: Job, known: Sequence[Job], left: Mapping[str, str]) -> bool:
    """Whether a run of the same sweep still has a task in the arrays that wait for this job."""
    waiting = [job for job in known if not job.shared and job.submitted == shared.submitted]
    return any(slurm.base(task) == slurm.base(job.id) and job.is_named(left[task]) for task in left for job in waiting)
