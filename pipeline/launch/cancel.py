"""`pipeline cancel`: takes the jobs of a run out of the queue, and says so in the run folder."""

from __future__ import annotations

from pipeline.launch import records, slurm
from pipeline.launch.job import note_cancelled
from pipeline.run import Run


def cancel(run: Run) -> list[str]:
    """Cancels what waits or runs of a run; returns the ids of its jobs, none if nothing was there.

    Training saves before it ends, as far as the cluster's KillWait allows; nothing is requeued.

    Raises:
        SlurmError: Slurm does not answer.
    """
    own = [job.id for job in records.jobs(run) if not job.shared]
    active = {info.id for info in slurm.queued(own).values() if info.active}
    ids = [job for job in own if job in active or job in map(slurm.base, active)]
    slurm.cancel(ids)
    for job in ids:
        note_cancelled(run.events_file, job)
    return ids
