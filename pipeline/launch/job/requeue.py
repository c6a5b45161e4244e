"""Repeating a job from its own batch script: on its nodes, or through the queue without those known to be bad."""

from __future__ import annotations

import math
import os
import signal
import sys
import time

from pipeline.launch.job.spec import Attempt
from pipeline.launch.slurm import client as slurm
from pipeline.run.world import DEADLINE_VARIABLE

# Slurm kills the batch script after requeueing the job; a script that ends earlier looks like the end of the job.
_KILLED_WITHIN_S = 120.0
_REQUEUE_TRIES, _REQUEUE_WAIT_S = 30, 5.0
# With less of a long time limit left, the queue is worth its wait: it gives the job the whole limit again.
_WORTH_A_START_S = 600.0


def holds_its_nodes(attempt: Attempt) -> bool:
    """Returns whether the job still has this allocation, for long enough that starting again in it is worth while."""
    left = float(os.environ.get(DEADLINE_VARIABLE, math.inf)) - time.time()
    if left < min(_WORTH_A_START_S, attempt.resources.time_limit_min * 60 / 2):
        return False
    job = slurm.show(attempt.raw_job) or {}
    return job.get("JobState") == "RUNNING" and job.get("Restarts", "0") == str(attempt.allocation)


def requeue(attempt: Attempt, nodes: list[str], exclude: list[str]) -> bool:
    """Requeues the job and waits to be killed; returns False if the controller never answered."""
    # Slurm sends TERM to the batch script as soon as the job is requeued; the rest takes less than KillWait.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for _ in range(_REQUEUE_TRIES):
        try:
            slurm.call("scontrol", "requeue", attempt.raw_job)
            break
        except slurm.SlurmError as error:
            print(f"pipeline: {error}; trying again", file=sys.stderr, flush=True)
            time.sleep(_REQUEUE_WAIT_S)
    else:
        return False
    if exclude and attempt.site.requeue.exclude_lost_nodes:
        _exclude(attempt, nodes, exclude)
    time.sleep(_KILLED_WITHIN_S)
    return True


def _exclude(attempt: Attempt, nodes: list[str], bad: list[str]) -> None:
    """Excludes bad nodes from the waiting job if enough nodes of its kind are left.

    Slurm accepts this change for waiting jobs only.
    """
    job = slurm.show(attempt.raw_job) or {}
    before = job.get("ExcNodeList", "(null)")
    excluded = {*bad, *(slurm.hostnames(before) if before != "(null)" else [])}
    left = slurm.usable_nodes(job.get("Partition", ""), like=nodes) - excluded
    needed = int(job.get("NumNodes", "1").partition("-")[0])
    if len(left) < needed:
        print(
            f"pipeline: {', '.join(bad)} not excluded: only {len(left)} other nodes of this kind are left",
            file=sys.stderr,
        )
        return
    try:
        slurm.call("scontrol", "update", f"JobId={attempt.raw_job}", f"ExcNodeList={','.join(sorted(excluded))}")
    except slurm.SlurmError as error:
        print(f"pipeline: {', '.join(bad)} could not be excluded: {error}", file=sys.stderr, flush=True)
