"""The text that `pipeline submit` prints."""

from __future__ import annotations

import os
import shlex

from pipeline.errors import listing
from pipeline.launch.site import TrainResources
from pipeline.launch.slurm.inputs import set_by_user
from pipeline.launch.slurm.job_records import STAGES, Job
from pipeline.launch.submit.submit import Chain


def summary(chain: Chain, jobs: list[Job]) -> str:
    """Returns the runs, their jobs, and the commands to use next."""
    lines = [f"run {run.path}" for run in chain.runs]
    by_stage = {job.stage: (job, what) for job, what in zip(jobs, chain.jobs, strict=True)}
    before: Job | None = None
    for stage in STAGES:
        if stage in chain.skipped:
            lines.append(f"  {stage:<9} skipped: {chain.skipped[stage]}")
            continue
        job, what = by_stage[stage]
        ask = what.resources
        size = f"{job.tasks} tasks" if job.tasks > 1 else "1 task"
        if isinstance(ask, TrainResources):
            size = (f"{job.tasks} runs of " if job.tasks > 1 else "") + f"{ask.nodes} x {ask.tasks_per_node} processes"
        waits = f", after job {before.id}" if before else ""
        lines.append(f"  {stage:<9} job {job.id}: {size}, {ask.time_limit_min} min{waits}")
        before = job
    if not jobs:
        return "\n".join([*lines, "Everything is done; nothing was submitted."])
    ignored = set_by_user(os.environ)
    if ignored:
        lines.append(f"ignored: {', '.join(ignored)} of this shell; {chain.site_file} says what jobs request")
    folders = [shlex.quote(str(run.path)) for run in chain.runs]
    shown = folders[0] if len(folders) == 1 else folders[0] + " ..."
    next_steps = [f"state   pipeline status {shown}", f"output  pipeline logs -f {folders[0]}"]
    return "\n".join([*lines, listing("What next:", [*next_steps, f"stop    pipeline cancel {shown}"])])
