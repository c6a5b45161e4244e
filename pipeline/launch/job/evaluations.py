"""Submits a job for each new checkpoint, beside rank 0 on the host, that evaluates tasks while training continues.

The checkpoint is pinned and the file of its job written before the job is submitted. A start that finds the file
submits nothing; what was killed in between is left to the evaluation after training, which does whatever is missing.
"""

from __future__ import annotations

import time
from pathlib import Path

from pipeline.checkpoint.layout import published, step_of
from pipeline.checkpoint.pins import pin, unpin
from pipeline.launch.job.spec import Attempt, JobSpec, Task
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run.folder import Run, step_name


def submit_evaluations(attempt: Attempt) -> None:
    """Submits a job for each checkpoint that has none; the last step is left to the evaluation after training.

    Raises:
        FailedJobError, FailedSubmissionError: Slurm refuses a job.
        OSError: The run folder cannot be written.
    """
    from pipeline.launch.job.batch_script import executor, submit_tasks  # it imports what runs this thread

    run, last = attempt.run, attempt.run.config().train.max_iters
    for checkpoint in reversed(published(run.checkpoints)):
        step = step_of(checkpoint) or 0
        job = _job(attempt, step)
        if step >= last or job.file.exists():
            continue
        _hold(checkpoint, run)
        if not checkpoint.is_dir():  # retention was faster
            _let_go(checkpoint, run)
            continue
        job.save()
        try:
            job_id = submit_tasks(executor(job, None), job)
        except BaseException:
            job.file.unlink(missing_ok=True)
            raise
        site = attempt.site
        made = Job(job_id, "evaluate", 1, round(time.time(), 3), site.name, site.accounting, name=job.name)
        job_records.add_evaluation_job(run, made)


def unpin_evaluated(run: Run) -> None:
    """Lets retention have the checkpoints that waited for an evaluation."""
    for checkpoint in published(run.checkpoints):
        _let_go(checkpoint, run)


def _hold(checkpoint: Path, run: Run) -> None:
    holder = run.evaluations / checkpoint.name
    holder.mkdir(parents=True, exist_ok=True)
    pin(checkpoint, holder)


def _let_go(checkpoint: Path, run: Run) -> None:
    unpin(checkpoint.parent, run.evaluations / checkpoint.name)


def _job(attempt: Attempt, step: int) -> JobSpec:
    run, site = attempt.run, attempt.site
    command = ("evaluate", str(run.path), *run.config().evaluate.options(), "--step", str(step))
    return JobSpec(
        name=f"{run.name}-evaluate-{step}",
        stage="evaluate",
        tasks=(Task(attempt.task.run, (command,)),),
        site=site,
        resources=site.evaluate,
        parallel=1,
        signal_before_end_s=30,
        code=run.code.absolute(),
        folder=run.launch.absolute(),
        beside=f"evaluate_{step_name(step)}",
    )
