"""The texts that `pipeline submit` prints: what was submitted, or with `--dry-run` what would be."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from pipeline.errors import listing
from pipeline.launch.job.batch_script import executor
from pipeline.launch.job.rank import command_line
from pipeline.launch.job.spec import JobSpec
from pipeline.launch.site import TrainResources
from pipeline.launch.slurm.inputs import set_by_user
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.submit.chain import Chain
from pipeline.launch.submit.submit import dependency, waits_for
from pipeline.run.attempts import STAGES
from pipeline.run.folder import Run


def summary(chain: Chain, jobs: list[Job]) -> str:
    """Returns the runs, their jobs, and the commands to use next."""
    lines = [f"run {run.path}" for run in chain.runs]
    left = list(jobs)
    own, left = left[: len(chain.jobs)], left[len(chain.jobs) :]
    lines += _stages(chain, own, None)
    for decay, part in chain.decays:
        lines.append(f"run {decay.run.path}, decays from step {decay.step} of {decay.stable.path}")
        of_decay, left = left[: len(part.jobs)], left[len(part.jobs) :]
        lines += _stages(part, of_decay, None if decay.is_due else f"when step {decay.step} is saved")
    if not jobs:
        return "\n".join([*lines, "Everything is done; nothing was submitted."])
    ignored = set_by_user(os.environ)
    if ignored:
        lines.append(f"ignored: {', '.join(ignored)} of this shell; {chain.site_file} says what jobs request")
    first, whole = (shlex.quote(str(run.path)) for run in (chain.runs[0], chain.home))  # a sweep's folder is all runs
    next_steps = [f"state   pipeline status {whole}", f"output  pipeline logs -f {first}"]
    next_steps += [f"curves  pipeline report {whole}"] if chain.is_sweep or chain.decays else []
    return "\n".join([*lines, listing("What next:", [*next_steps, f"stop    pipeline cancel {whole}"])])


def _stages(chain: Chain, jobs: list[Job], first: str | None) -> list[str]:
    """Returns a line for each stage of a chain; `first` is what its first job waits for, in words."""
    lines = []
    by_stage = {job.stage: (job, what) for job, what in zip(jobs, chain.jobs, strict=True)}
    before: Job | None = None
    for stage in STAGES:
        if stage not in by_stage and stage not in chain.skipped:
            continue  # of a decay, whose stable run prepares the data
        if stage in chain.skipped:
            lines.append(f"  {stage:<9} skipped: {chain.skipped[stage]}")
            continue
        job, what = by_stage[stage]
        ask = what.resources
        size = f"{job.tasks} tasks" if job.tasks > 1 else "1 task"
        if isinstance(ask, TrainResources):
            size = (f"{job.tasks} runs of " if job.tasks > 1 else "") + f"{ask.nodes} x {ask.tasks_per_node} processes"
        waits = f", after job {before.id}" if before else f", {first}" if first else ""
        lines.append(f"  {stage:<9} job {job.id}: {size}, {ask.time_limit_min} min{waits}")
        before = job
    return lines


def dry_run(chain: Chain) -> str:
    """Returns every batch script and the command its tasks run, or why there is none; nothing is submitted."""
    if not any(part.jobs for part in chain.parts):
        return f"{summary(chain, [])}\n"
    parts, stable = _of_chain(chain, None)
    for decay, part in chain.decays:
        parts += _of_chain(part, waits_for(decay, chain, stable))[0]
    return "\n".join(parts)


def _of_chain(chain: Chain, first: str | None) -> tuple[list[str], list[Job]]:
    """Returns the texts of the jobs of a chain, and the jobs with placeholders for their ids."""
    parts: list[str] = []
    before: list[Job] = []
    for job in chain.jobs:
        text = executor(job, dependency(chain, before) or first).text(len(job.tasks))
        parts.append(f"### {job.stage}: {job.name}\n{text.rstrip()}\n")
        count = len(job.tasks)
        whose = f"the first of {count} array tasks" if count > 1 else "every process"
        lines = [f"#   {line}" for line in _inner_commands(chain, job)]
        parts.append("\n".join([f"# {whose} starts, with the variables of its rank added:", *lines]) + "\n")
        before.append(Job(f"<{job.stage}>", job.stage, 1, 0.0, chain.site.name, False))
    return parts, before


def _inner_commands(chain: Chain, job: JobSpec) -> list[str]:
    """Returns what the first task starts; the other tasks differ only in their slice or run."""
    task = job.tasks[0]
    run = Run(Path(task.run))
    return [shlex.join(command_line(chain.configs[0], chain.site, run, command, {})) for command in task.commands]
