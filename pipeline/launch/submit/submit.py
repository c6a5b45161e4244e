"""`pipeline submit`: submits the whole pipeline as a chain of Slurm jobs, or nothing."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from submitit.core.utils import FailedJobError, FailedSubmissionError

from pipeline.checkpoint.layout import published, step_of
from pipeline.config.sections import Config
from pipeline.data.fingerprint import refuse_other_settings
from pipeline.data.layout import MANIFEST
from pipeline.data.manifest import DatasetManifest
from pipeline.errors import PipelineError
from pipeline.files import read_json
from pipeline.launch.container.binds import create_folders
from pipeline.launch.job.batch_script import executor, submit_tasks
from pipeline.launch.job.rank import command_line
from pipeline.launch.job.spec import JobSpec, Task
from pipeline.launch.site import Site, load_site
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job, Stage
from pipeline.launch.submit.admission import refuse_active, refuse_invisible, refuse_unfit_folder, refuse_unfit_images
from pipeline.launch.submit.sbatch_errors import refused
from pipeline.launch.submit.signal_time import signal_time_s
from pipeline.launch.submit.snapshot import take_snapshot
from pipeline.launch.submit.sweep import experiments, home_of
from pipeline.launch.submit.undo import undone_on_failure
from pipeline.run.events import Submitted, append
from pipeline.run.folder import Run, create_run, run_for


@dataclass(frozen=True)
class Chain:
    """A submission: the runs and the jobs that work on them."""

    configs: list[Config]
    """One per run."""
    site: Site
    site_file: str
    """As the user gave it, for messages."""
    jobs: list[JobSpec]
    """In the order in which they wait for each other."""
    skipped: dict[Stage, str]
    """Stages that are already done, with the reason."""
    home: Run
    """Holds the files of the jobs: the run, or a folder for the whole sweep."""
    allow_image_change: bool
    """Whether a run may continue in another image than the one it was trained in."""

    @property
    def runs(self) -> list[Run]:
        """The runs, in the order of the configs."""
        return [run_for(config) for config in self.configs]

    @property
    def is_sweep(self) -> bool:
        """Whether the jobs are arrays with one task per run."""
        return len(self.configs) > 1


def plan_chain(
    config_file: str,
    site_file: str,
    overrides: Sequence[str],
    sweeps: Sequence[str],
    allow_image_change: bool = False,
) -> Chain:
    """Reads config and site and decides which jobs are needed; changes nothing.

    Raises:
        ConfigError: Everything that is wrong with the config or the site file.
        UsageError: They do not fit together.
    """
    site = load_site(site_file)
    configs = experiments(config_file, overrides, sweeps, site.train.nodes * site.train.tasks_per_node)
    home = home_of(configs)
    refuse_unfit_folder(home)
    refuse_invisible(configs, site)
    commands, skipped = _stages(configs, site, _train_options(allow_image_change))
    jobs = [_job(stage, tasks, configs, site, home) for stage, tasks in commands.items()]
    return Chain(configs, site, site_file, jobs, skipped, home, allow_image_change)


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
    refuse_active(chain.runs, chain.home)
    refuse_unfit_images(chain.configs, chain.site, chain.allow_image_change)
    with undone_on_failure(chain.runs, chain.home) as submitted:
        _make_folders(chain)
        now = round(time.time(), 3)
        for job in chain.jobs:
            submitted.append(_submit_job(chain, job, submitted, now))
        for index, run in enumerate(chain.runs):
            own = [_of_run(job, chain, index) for job in submitted]
            job_records.add_jobs(run, own)
            append(run.events_file, Submitted(jobs=[job.id for job in own], site=chain.site.name))
        if chain.is_sweep:
            job_records.add_jobs(chain.home, submitted)
    return submitted


def dry_run(chain: Chain) -> str:
    """Returns every batch script and the command its tasks run; nothing is written or submitted."""
    parts = []
    for job, dependency in zip(chain.jobs, _placeholders(chain), strict=True):
        text = executor(job, dependency).text(len(job.tasks))
        parts.append(f"### {job.stage}: {job.name}\n{text.rstrip()}\n")
        count = len(job.tasks)
        whose = f"the first of {count} array tasks" if count > 1 else "every process"
        lines = [f"#   {line}" for line in _inner_commands(chain, job)]
        parts.append("\n".join([f"# {whose} starts, with the variables of its rank added:", *lines]) + "\n")
    return "\n".join(parts)


# ---- which jobs are needed -----------------------------------------------------------------------


def _train_options(allow_image_change: bool) -> tuple[str, ...]:
    # What was in the queue is refused here. A requeued job must not wait for its own attempt on a node that is lost.
    return ("--take-over", *(("--allow-image-change",) if allow_image_change else ()))


def _stages(
    configs: list[Config], site: Site, train_options: tuple[str, ...]
) -> tuple[dict[Stage, list[Task]], dict[Stage, str]]:
    """Returns the tasks of every stage that is not done, and why each other stage is skipped."""
    todo: dict[Stage, list[Task]] = {}
    skipped: dict[Stage, str] = {}
    manifest = Path(configs[0].data.path) / MANIFEST
    if manifest.is_file():
        tree = read_json(manifest, manifest.parent)
        if isinstance(tree, dict) and tree:
            settings = DatasetManifest.load(configs[0].data.path).settings
            refuse_other_settings(configs[0].data.path, settings, configs[0])
        skipped["prepare"] = f"{manifest} is there"
    else:
        slices, run = site.prepare.slices, run_for(configs[0])
        todo["prepare"] = [
            Task(str(run.path), (("prepare", str(run.config_file), "--slice", f"{i}/{slices}"),))
            for i in range(1, slices + 1)
        ]
    untrained = [c for c in configs if not _trained(c)]
    if untrained:
        todo["train"] = [
            Task(str(run_for(c).path), (("train", str(run_for(c).config_file), *train_options),)) for c in configs
        ]
    else:
        skipped["train"] = f"step {configs[0].train.max_iters} is saved"
    if untrained or not all(_evaluated(c) for c in configs):
        todo["evaluate"] = [
            Task(str(run_for(c).path), (("evaluate", str(run_for(c).path)), ("report", str(run_for(c).path))))
            for c in configs
        ]
    else:
        skipped["evaluate"] = "evaluation.json and report.html are there"
    return todo, skipped


def _trained(config: Config) -> bool:
    return any((step_of(path) or 0) >= config.train.max_iters for path in published(run_for(config).checkpoints))


def _evaluated(config: Config) -> bool:
    run = run_for(config)
    found = run.evaluation()
    return found is not None and run.report_file.is_file() and found["step"] >= config.train.max_iters


def _job(stage: Stage, tasks: list[Task], configs: list[Config], site: Site, home: Run) -> JobSpec:
    return JobSpec(
        name=f"{home.name}-{stage}",
        stage=stage,
        tasks=tuple(tasks),
        site=site,
        resources={"prepare": site.prepare, "train": site.train, "evaluate": site.evaluate}[stage],
        parallel=site.prepare.max_parallel if stage == "prepare" else len(tasks),
        signal_before_end_s=max(signal_time_s(run_for(c), site) for c in configs) if stage == "train" else 30,
        code=home.code.absolute(),
        folder=home.launch.absolute(),
    )


# ---- submitting ----------------------------------------------------------------------------------


def _make_folders(chain: Chain) -> None:
    for config in chain.configs:
        run = create_run(config)
        run.launch.mkdir(exist_ok=True)
        run.events_file.touch()  # the first job may write to it before this process does
        if config.container.image is not None:
            create_folders(config, run)  # Apptainer cannot bind what is not there
        take_snapshot(run.code)
    chain.home.launch.mkdir(parents=True, exist_ok=True)
    if chain.is_sweep:
        take_snapshot(chain.home.code)
    for job in chain.jobs:
        job.save()


def _submit_job(chain: Chain, job: JobSpec, before: list[Job], now: float) -> Job:
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):  # submitit also prints what it raises
            made = executor(job, _dependency(chain, before))
            job_id = submit_tasks(made, job)
    except (FailedJobError, FailedSubmissionError) as error:
        raise refused(str(error), job.stage, chain.site_file) from error
    return Job(job_id, job.stage, len(job.tasks), now, chain.site.name, chain.site.accounting, name=job.name)


def _dependency(chain: Chain, before: list[Job]) -> str | None:
    if not before:
        return None
    # In a sweep, the evaluation of a run waits for the training of that run only; slices belong to no run.
    kind = "aftercorr" if before[-1].stage == "train" and chain.is_sweep else "afterok"
    return f"{kind}:{before[-1].id}"


def _placeholders(chain: Chain) -> list[str | None]:
    before: list[Job] = []
    found: list[str | None] = []
    for job in chain.jobs:
        found.append(_dependency(chain, before))
        before.append(Job(f"<{job.stage}>", job.stage, 1, 0.0, chain.site.name, False))
    return found


def _of_run(job: Job, chain: Chain, index: int) -> Job:
    """Returns a job as one run of a sweep sees it: its own task of the array."""
    if not chain.is_sweep:
        return job
    if job.stage == "prepare":
        return replace(job, shared=True)
    return replace(job, id=f"{job.id}_{index}", tasks=1)


def _inner_commands(chain: Chain, job: JobSpec) -> list[str]:
    """Returns what the first task starts; the other tasks differ only in their slice or run."""
    task = job.tasks[0]
    run = Run(Path(task.run))
    return [
        shlex.join(command_line(chain.configs[0], chain.site, run, command, chain.site.environment))
        for command in task.commands
    ]
