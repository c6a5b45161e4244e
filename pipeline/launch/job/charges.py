"""Records what Slurm's accounting says about the jobs before the evaluation: report and MLflow cannot ask Slurm."""

from __future__ import annotations

import sys
import time

from pipeline.errors import PipelineError
from pipeline.launch.job.spec import Attempt
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run import attempts
from pipeline.run.attempts import Charged
from pipeline.text_format import echo

# The evaluation may start 50 ms after the training, and accounting hears of a job's start and end some seconds later.
_QUESTIONS, _PAUSE_S = 6, 1.0


def record_charges(attempt: Attempt) -> None:
    """Records the allocations of the run that have ended; a failure is one line in the job's log."""
    run = attempt.run
    try:
        before = [job for job in job_records.jobs(run) if job.stage != "evaluate"]
        known = [row.fields() for row in attempts.every(run).of(Charged)]
        for row in _charges(before):
            if row.fields() not in known:
                attempts.note(run, row)
    except (OSError, PipelineError) as error:
        echo(f"pipeline: what the jobs of the run cost is not recorded: {error}", sys.stderr)


def _charges(jobs: list[Job]) -> list[Charged]:
    """Returns the allocations of these jobs, as soon as accounting has one of each, or what it has after a while."""
    asked = [job for job in jobs if job.accounting and not job.shared]
    found: list[Charged] = []
    for question in range(_QUESTIONS):
        if question:
            time.sleep(_PAUSE_S)
        found = job_records.charges(asked)
        if all(any(job.holds(row.job) for row in found) for job in asked):
            break
    return found
