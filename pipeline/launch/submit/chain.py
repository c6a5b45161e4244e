"""What a submission consists of: which jobs are needed for which runs. Nothing here is written or submitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.checkpoint.layout import published, step_of
from pipeline.config.sections import Config
from pipeline.data.fingerprint import refuse_other_settings
from pipeline.data.layout import MANIFEST
from pipeline.data.manifest import DatasetManifest
from pipeline.files import read_json
from pipeline.launch.job.spec import JobSpec, Task
from pipeline.launch.notify.settings import load as load_notify
from pipeline.launch.notify.settings import settings_file
from pipeline.launch.site import Site, load_site
from pipeline.launch.submit.admission import refuse_invisible, refuse_unfit_folder
from pipeline.launch.submit.decays import Decay, split
from pipeline.launch.submit.signal_time import signal_time_s
from pipeline.launch.submit.sweep import experiments
from pipeline.run.attempts import Stage
from pipeline.run.evaluations import evaluation_file
from pipeline.run.folder import Run, run_for


@dataclass(frozen=True)
class Chain:
    """A submission: the runs and the jobs that work on them."""

    configs: list[Config]
    """One per run."""
    values: list[dict[str, str]]
    """What each run takes from the sweep, by dotted key."""
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
    decays: list[tuple[Decay, Chain]] = field(default_factory=list)
    """The decays of its runs, each with its own jobs."""

    @property
    def runs(self) -> list[Run]:
        """The runs, in the order of the configs."""
        return [run_for(config) for config in self.configs]

    @property
    def is_sweep(self) -> bool:
        """Whether the jobs are arrays with one task per run."""
        return len(self.configs) > 1

    @property
    def parts(self) -> list[Chain]:
        """This chain and those of its decays."""
        return [self, *(part for _, part in self.decays)]


def plan_chain(
    config_file: str,
    site_file: str,
    overrides: Sequence[str],
    sweeps: Sequence[str],
    allow_image_change: bool = False,
    max_parallel: int | None = None,
    decay_at: Sequence[int] = (),
) -> Chain:
    """Reads config and site and decides which jobs are needed; changes nothing.

    Args:
        config_file: The experiment.
        site_file: The cluster.
        overrides: Dotted overrides of the config.
        sweeps: Lists or files of values, which make several runs of it.
        allow_image_change: Whether a run may continue in another image than the one it was trained in.
        max_parallel: Runs of a sweep that may train at the same time; None for all.
        decay_at: Steps from which runs of their own decay; the run of the config is then the stable one.

    Raises:
        ConfigError: Everything that is wrong with the config, the site file or the user's `notify.yaml`.
        UsageError: They do not fit together.
    """
    site = load_site(site_file)
    notify = settings_file()
    if notify is not None:
        load_notify(notify)
    found = experiments(config_file, overrides, sweeps, site.train.nodes * site.train.tasks_per_node)
    configs, home = found.configs, found.home
    refuse_unfit_folder(home)
    pairs = [split(config, decay_at) if decay_at else (config, []) for config in configs]
    configs, decays = [stable for stable, _ in pairs], [decay for _, of_run in pairs for decay in of_run]
    refuse_invisible(configs, site)
    commands, skipped = _stages(configs, site, _train_options(allow_image_change))
    jobs = [_job(stage, tasks, configs, site, home, notify) for stage, tasks in commands.items()]
    jobs = [replace(job, parallel=max_parallel) if job.stage == "train" and max_parallel else job for job in jobs]
    chain = Chain(configs, found.values, site, site_file, jobs, skipped, home, allow_image_change)
    return replace(chain, decays=[(decay, _chain_of(decay, chain, notify)) for decay in decays])


def _chain_of(decay: Decay, stable: Chain, notify: Path | None) -> Chain:
    commands, skipped = _stages([decay.config], stable.site, _train_options(stable.allow_image_change))
    commands.pop("prepare", None)  # the stable run waits for it
    if "evaluate" in commands:
        [task] = commands["evaluate"]
        # Not an artifact of the stable run yet: its own training may be sending to MLflow.
        page = ("report", str(decay.stable.path), "--output", str(decay.stable.report_file))
        commands["evaluate"] = [replace(task, commands=(*task.commands, page))]
    jobs = [_job(stage, tasks, [decay.config], stable.site, decay.run, notify) for stage, tasks in commands.items()]
    return replace(stable, configs=[decay.config], values=[{}], jobs=jobs, skipped=skipped, home=decay.run)


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
    if untrained or not all(is_evaluated(c) for c in configs):
        todo["evaluate"] = [Task(str(run_for(c).path), evaluation_commands(c)) for c in configs]
    else:
        skipped["evaluate"] = "evaluation.json and report.html are there"
    return todo, skipped


def _trained(config: Config) -> bool:
    return any((step_of(path) or 0) >= config.train.max_iters for path in published(run_for(config).checkpoints))


def evaluation_commands(config: Config) -> tuple[tuple[str, ...], ...]:
    """Returns the commands of the evaluation after the training of one run.

    With `every_checkpoint` it evaluates whatever the jobs beside the training have not.
    """
    folder, asked = str(run_for(config).path), config.evaluate
    every = ("--every-checkpoint",) if asked.every_checkpoint else ()
    tasks = (("evaluate", folder, *asked.options(), *every),) if asked.tasks else ()
    return (("evaluate", folder), *tasks, ("report", folder))


def is_evaluated(config: Config) -> bool:
    """Whether the last step is evaluated, on the validation split and on all tasks, and the report is there."""
    run, last, asked = run_for(config), config.train.max_iters, config.evaluate
    found = run.evaluation()
    files = [evaluation_file(run, last, name, asked.num_fewshot, asked.limit) for name in asked.tasks]
    there = run.report_file.is_file() and all(file.is_file() for file in files)
    return found is not None and there and found["step"] >= last


def _job(stage: Stage, tasks: list[Task], configs: list[Config], site: Site, home: Run, notify: Path | None) -> JobSpec:
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
        notify=notify,
    )
