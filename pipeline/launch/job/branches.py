"""Starts the decays of a stable run, beside its rank 0 on the host, as soon as their checkpoints are published.

Their jobs are in the queue from the beginning, with `afterok` on the stable job: Slurm cancels them if that fails, and
starts them when it ends, whatever happens to the host. Here each loses this dependency once its checkpoint is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.checkpoint.layout import published, step_of
from pipeline.launch.slurm import client as slurm
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run.events import BranchReleased, EventLog, append
from pipeline.run.folder import Run
from pipeline.run.related import read_branches


def release(run: Run, started: set[str]) -> None:
    """Removes the dependency of each waiting decay whose checkpoint is published.

    Args:
        run: The stable run.
        started: Names of the decays that need nothing more; this adds to them.

    Raises:
        SlurmError: Slurm does not answer.
        PipelineError: A record of a run is damaged.
        OSError: The event cannot be written.
    """
    waiting = [branch for branch in read_branches(run) if branch.run.name not in started]
    if not waiting:
        return
    there = {step_of(path) for path in published(run.checkpoints)}
    due = [(branch, job) for branch in waiting if branch.step in there and (job := _training(branch.run)) is not None]
    if not due:
        return
    queue = slurm.queued(job.id for _, job in due)
    released = {event.job for event in EventLog.load(run.events_file).of(BranchReleased)}
    for branch, job in due:
        info = queue.get(job.id)
        if info is not None and info.state == "PENDING" and job.is_named(info.name) and job.id not in released:
            slurm.call("scontrol", "update", f"JobId={job.id}", "Dependency=")
            append(run.events_file, BranchReleased(step=branch.step, run=branch.run.name, job=job.id))
        started.add(branch.run.name)


def _training(branch: Run) -> Job | None:
    """Returns the newest training job of a branch; None before it is submitted."""
    jobs: Sequence[Job] = job_records.jobs(branch)
    return next((job for job in reversed(jobs) if job.stage == "train"), None)
