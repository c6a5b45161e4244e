"""Records what Slurm's accounting says about the jobs before the evaluation: report and MLflow cannot ask Slurm."""

from __future__ import annotations

import sys

from pipeline.errors import PipelineError
from pipeline.launch.job.spec import Attempt
from pipeline.launch.slurm import job_records
from pipeline.run import attempts
from pipeline.run.attempts import Charged
from pipeline.text_format import echo


def record_charges(attempt: Attempt) -> None:
    """Records the allocations of the run that have ended; a failure is one line in the job's log."""
    run = attempt.run
    try:
        before = [job for job in job_records.jobs(run) if job.stage != "evaluate"]
        known = [row.fields() for row in attempts.every(run).of(Charged)]
        for row in job_records.charges(before):
            if row.fields() not in known:
                attempts.note(run, row)
    except (OSError, PipelineError) as error:
        echo(f"pipeline: what the jobs of the run cost is not recorded: {error}", sys.stderr)
