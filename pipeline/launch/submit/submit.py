"""`pipeline submit`: submits the whole pipeline as a chain of Slurm jobs, or nothing."""

from __future__ import annotations

import contextlib
import io
import shutil
import time
from dataclasses import replace

from submitit.core.utils import FailedJobError, FailedSubmissionError

from pipeline.errors import PipelineError
from pipeline.launch.container.binds import create_folders
from pipeline.launch.job.batch_script import executor, submit_tasks
from pipeline.launch.job.spec import JobSpec
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.launch.submit.admission import refuse_active, refuse_unfit_images
from pipeline.launch.submit.chain import Chain
from pipeline.launch.submit.decays import Decay, protect, unpinned_on_failure
from pipeline.launch.submit.sbatch_errors import refused
from pipeline.launch.submit.snapshot import share_snapshot, take_snapshot
from pipeline.launch.submit.undo import undone_on_failure
from pipeline.run.events import Submitted, append
from pipeline.run.folder import create_run
from pipeline.run.related import SweepRun, add_branches, write_sweep


def submit(chain: Chain) -> list[Job]:
    """Submits the jobs; if one is refused, the jobs before it are cancelled.

    Raises:
        UsageError: A run is already in the queue, its image cannot be used, or Slurm refuses what the site file asks
            for.
        PipelineError: Slurm does not answer, or the run folder cannot be written.
    """
    if shutil.which("sbatch") is None:
        raise PipelineError(
            "sbatch: not found on this machine, so nothing can be submitted from here; "
            "`pipeline run` does the same work here, and `--dry-run` shows the jobs"
        )
    runs = [run for part in chain.parts for run in part.runs]
    refuse_active(runs, chain.home)
    refuse_unfit_images(
        [config for part in chain.parts for config in part.configs], chain.site, chain.allow_image_change
    )
    decays = [decay for decay, _ in chain.decays]
    with unpinned_on_failure(decays), undone_on_failure(runs, chain.home) as submitted:
        for part in chain.parts:
            _make_folders(part)
        for decay in decays:
            protect(decay)
        now = round(time.time(), 3)
        stable = _submit_jobs(chain, None, submitted, now)
        found = [(chain, stable)]
        for decay, part in chain.decays:
            found.append((part, _submit_jobs(part, waits_for(decay, chain, stable), submitted, now)))
        for part, jobs in found:
            _record(part, jobs)
        for decay in decays:
            add_branches(decay.stable, [decay.branch])
    return submitted


def _submit_jobs(chain: Chain, first: str | None, submitted: list[Job], now: float) -> list[Job]:
    """Submits the jobs of a chain, of which the first has the dependency `first`, and adds each to `submitted`."""
    own: list[Job] = []
    for job in chain.jobs:
        own.append(_submit_job(chain, job, dependency(chain, own) or first, now))
        submitted.append(own[-1])
    return own


def _record(chain: Chain, jobs: list[Job]) -> None:
    for index, run in enumerate(chain.runs):
        own = [_of_run(job, chain, index) for job in jobs]
        if own:
            job_records.add_jobs(run, own)
            append(run.events_file, Submitted(jobs=[job.id for job in own], site=chain.site.name))
    if chain.is_sweep:
        job_records.add_jobs(chain.home, jobs)
        runs = zip(chain.runs, chain.values, strict=True)
        write_sweep(chain.home, [SweepRun(run, values) for run, values in runs])


def _make_folders(chain: Chain) -> None:
    runs = [create_run(config) for config in chain.configs]  # it refuses before anything is replaced
    chain.home.launch.mkdir(parents=True, exist_ok=True)
    take_snapshot(chain.home.code)
    for config, run in zip(chain.configs, runs, strict=True):
        run.launch.mkdir(exist_ok=True)
        run.events_file.touch()  # the first job may write to it before this process does
        if config.container.image is not None:
            create_folders(config, run)  # Apptainer cannot bind what is not there
        if chain.is_sweep:
            share_snapshot(chain.home.code, run.code)
    for job in chain.jobs:
        job.save()


def _submit_job(chain: Chain, job: JobSpec, after: str | None, now: float) -> Job:
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):  # submitit also prints what it raises
            made = executor(job, after)
            job_id = submit_tasks(made, job)
    except (FailedJobError, FailedSubmissionError) as error:
        raise refused(str(error), job.stage, chain.site_file) from error
    return Job(job_id, job.stage, len(job.tasks), now, chain.site.name, chain.site.accounting, name=job.name)


def dependency(chain: Chain, before: list[Job]) -> str | None:
    """Returns what the next job of a chain waits for, in sbatch's form; `before` are the jobs before it."""
    if not before:
        return None
    # In a sweep, the evaluation of a run waits for the training of that run only; slices belong to no run.
    kind = "aftercorr" if before[-1].stage == "train" and chain.is_sweep else "afterok"
    return f"{kind}:{before[-1].id}"


def waits_for(decay: Decay, chain: Chain, stable: list[Job]) -> str | None:
    """Returns the dependency with which the training of a decay is submitted.

    A host of the stable run removes it when the checkpoint is published. Until then Slurm cancels the decay if the
    stable run fails, and it starts the decay when the run has ended, even if no host could.
    """
    train = next((job for job in stable if job.stage == "train"), None)
    if decay.is_due or train is None:
        return None
    index = [run.path for run in chain.runs].index(decay.stable.path)
    return f"afterok:{_of_run(train, chain, index).id}"


def _of_run(job: Job, chain: Chain, index: int) -> Job:
    """Returns a job as one run of a sweep sees it: its own task of the array."""
    if not chain.is_sweep:
        return job
    if job.stage == "prepare":
        return replace(job, shared=True)
    return replace(job, id=f"{job.id}_{index}", tasks=1)
