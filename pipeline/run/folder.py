"""The run folder: the only code that knows its file names (a contract, documented in docs/run-folder.md)."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.data_sections import DataConfig
from pipeline.config.load import CONFIG, dump_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import PipelineError, UsageError, listing
from pipeline.files import naming, read_json, write_json, write_text
from pipeline.optim.schedule import first_other_rate, learning_rates
from pipeline.run.events import EventLog, RolledBack
from pipeline.run.records import EVALUATION, PROVENANCE, Evaluation, Origin, read_checked
from pipeline.text_format import located

# What the weights after step t are a function of. Everything else (intervals, ZeRO stage, precision,
# micro-batch, device, tracking ...) may change between two starts of one run; the schedule and the phases of the data
# may as far as they lie ahead.
_FIXED_SECTIONS = ("tokenizer", "model", "init")
_FIXED_FIELDS = {
    "data": ("path", "order", "mixing", "packing"),
    "train": ("batch_size", "seed"),
    "optimizer": ("learning_rate", "warmup_iters", "weight_decay", "decay_norms", "betas", "eps", "gradient_clip_val",
                  "z_loss"),
}  # fmt: skip

RUNS_DIR = str(Config.model_fields["runs_dir"].default)
CHECKPOINT_MANIFEST = "manifest.json"
_STEP = re.compile(r"step_([0-9]{8,15})")


def step_name(step: int) -> str:
    """Returns the folder name of the checkpoint after this many steps."""
    return f"step_{step:08d}"


def step_in(name: str) -> int | None:
    """Returns the step that the name of a folder claims; None if it is not that of a published checkpoint."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


class _Below:
    """A path of the run folder, relative to it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: Run, owner: type[Run]) -> Path:
        return run.path / self._name


@dataclass(frozen=True)
class Run:
    """Paths of one run, all below its folder."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return Path(os.path.abspath(self.path)).name  # noqa: PTH100  # `.` has no name; a link keeps its own

    config_file = _Below("config.yaml")
    """The resolved config."""
    provenance_file = _Below("provenance.json")
    """Commit, package versions, hosts, dataset digest: one entry per start."""
    metrics_file = _Below("metrics.jsonl")
    """One line per logged step; the source of truth."""
    events_file = _Below("events.jsonl")
    """Started, resumed, checkpointed, stopped, finished ..."""
    mlflow_file = _Below("mlflow.json")
    """Id of the MLflow run and how far it has been fed."""
    tracking = _Below("tracking")
    """State of tracking between two starts: locks, repeated lines, system metrics of each node."""
    system_metrics = _Below("tracking/system")
    """One journal of system metrics per node."""
    repeated_file = _Below("tracking/repeated.jsonl")
    """Published lines that training is about to repeat."""
    environment_file = _Below("tracking/environment.txt")
    """The installed packages."""
    checkpoint_list = _Below("tracking/checkpoints.json")
    """The published checkpoints, as an artifact for MLflow."""
    state_lock = _Below("tracking/state.lock")
    """Held while mlflow.json changes."""
    upload_lock = _Below("tracking/upload.lock")
    """Held while a process feeds MLflow."""
    tokenizer_file = _Below("tokenizer.json")
    """The tokenizer.json the run was trained with."""
    checkpoints = _Below("checkpoints")
    """One folder per checkpoint, visible only when complete."""
    bad_batches = _Below("bad_batches")
    """The batches that the guards reported: one JSON file per batch."""
    compiled = _Below("compiled")
    """What torch.compile made, for the next start on a machine of the same kind."""
    samples = _Below("samples")
    """Generated text."""
    code = _Below("code")
    """A copy of the submitted code, so that editing the checkout cannot change a queued job."""
    exports = _Below("export")
    """Models in the formats of other programs."""
    profiles = _Below("profiles")
    """Traces that `pipeline profile` asked for: one folder per request."""
    profile_request = _Below("profiles/request.json")
    """What `pipeline profile` asks of the training; removed when it is answered."""
    hangs = _Below("hangs")
    """Stacks and collectives of all ranks: one folder per step in which the ranks hung."""
    evaluation_file = _Below("evaluation.json")
    """The result of the last `pipeline evaluate`."""
    evaluations = _Below("evaluations")
    """The results of tasks; `run/evaluations.py` knows the files."""
    launch = _Below("launch")
    """Batch scripts, submitit's files and the two files below."""
    jobs_file = _Below("launch/jobs.json")
    """The Slurm jobs that were submitted for the run."""
    evaluation_jobs_file = _Below("launch/evaluation_jobs.json")
    """The Slurm jobs that evaluate checkpoints while training continues."""
    attempts_file = _Below("launch/attempts.jsonl")
    """The outcome of every attempt of a job: one line per record."""
    branches_file = _Below("launch/branches.json")
    """The runs that decay from checkpoints of this one."""
    logs = _Below("logs")
    """Output of jobs: one folder per Slurm job, one file per attempt and rank."""
    report_file = _Below("report.html")
    """The self-contained report page."""
    tensorboard = _Below("tensorboard")
    """The metrics as an event file for TensorBoard."""
    wandb = _Below("wandb")
    """The metrics as an offline run of Weights & Biases."""
    sweep_file = _Below("sweep.json")
    """Only in a sweep's folder, which is no run: names its runs."""

    def meeting_file(self, start: str) -> Path:
        """Returns the file through which the ranks of a start find each other; it exists only until they have."""
        return self.launch / f"meeting_{start}.json"

    def evaluation_lock(self, step: int) -> Path:
        """Returns the file that is locked while tasks are evaluated on a checkpoint."""
        return self.tracking / f"evaluate.{step_name(step)}.lock"

    def config(self) -> Config:
        """Returns the config that the run was created with."""
        return parse_config(self.config_text(), source=str(self.config_file))

    def config_text(self) -> str:
        """Returns the config file as it is.

        Raises:
            UsageError: It cannot be read, or is no text.
        """
        return CONFIG.read(self.config_file, self.path)

    def provenance(self) -> list[dict[str, Any]]:
        """Returns one entry per start of the run, oldest first."""
        if not self.provenance_file.exists():
            return []
        return list(read_checked(self.provenance_file, self.path, PROVENANCE)["starts"])

    def origin(self) -> Origin | None:
        """Returns what the run started from, as its newest start recorded it; None if its weights were drawn."""
        found = [start["init"] for start in self.provenance() if start.get("init")]
        return found[-1] if found else None

    def evaluation(self) -> Evaluation | None:
        """Returns the result of the last `pipeline evaluate`; None without one."""
        if not self.evaluation_file.exists():
            return None
        return read_checked(self.evaluation_file, self.path, EVALUATION)

    def add_provenance(self, start: dict[str, Any]) -> None:
        """Appends what is known about this start."""
        write_json(self.provenance_file, {"starts": [*self.provenance(), start]})


def run_for(config: Config) -> Run:
    """Returns the run that a config names, whether it exists or not."""
    return Run(Path(config.runs_dir) / config.name)


def open_run(named: str | Path) -> Run:
    """Returns the existing run that is named by its folder, by its name below `runs`, or by its config file.

    Raises:
        UsageError: There is no such run, or the config file is wrong.
    """
    path = Path(named)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        found = [Run(path.parent)] if path.name == "config.yaml" else []
        found.append(run_for(parse_config(CONFIG.read(path), source=str(path))))
        missing = f"{path}: its run, {found[-1].path}, does not exist yet; `pipeline train {path}` begins it"
    else:
        found = [Run(path)]
        if len(path.parts) == 1:
            found.append(Run(Path(RUNS_DIR) / path))
        missing = f"{located(path)}: is not a run folder (it has no config.yaml)"
    existing = next((run for run in found if run.config_file.is_file()), None)
    if existing is not None:
        return existing
    parent = found[-1].path.parent if not path.is_dir() else path
    near = sorted(str(p.parent) for p in parent.glob("*/config.yaml"))
    raise UsageError(missing + (f"; runs there: {', '.join(near)}" if near else ""))


def create_run(config: Config) -> Run:
    """Creates the run folder, or opens it if the run exists.

    Raises:
        UsageError: The run exists with settings that would change what is trained.
        PipelineError: The folder cannot be written.
    """
    run = run_for(config)
    with naming(run.path, "the run folder cannot be written", "choose another `runs_dir`"):
        run.path.mkdir(parents=True, exist_ok=True)
        if not os.access(run.path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        if run.config_file.exists() or newest_step(run.checkpoints):
            _refuse_other_experiment(run, config)
        if not run.config_file.exists() or run.config() != config:
            write_text(run.config_file, dump_config(config))
        run.checkpoints.mkdir(exist_ok=True)
    return run


def _config_of_checkpoint(run: Run) -> Config:
    """Returns the config of the newest checkpoint that tells it; damaged ones are quarantined later."""
    for step in reversed(_steps(run.checkpoints)):
        manifest = run.checkpoints / step_name(step) / CHECKPOINT_MANIFEST
        with contextlib.suppress(PipelineError, KeyError, TypeError):
            tree = read_json(manifest, manifest.parent)["state"]["config"]
            return parse_config(json.dumps(tree), source=str(manifest))
    raise UsageError(f"{run.config_file}: is missing, and no checkpoint tells what it held; restore it")


def _refuse_other_experiment(run: Run, new: Config) -> None:
    old = run.config() if run.config_file.exists() else _config_of_checkpoint(run)
    changed = [
        f"{section}.{field}: {getattr(before, field)!r} in the run, {getattr(after, field)!r} asked for"
        for section in (*_FIXED_SECTIONS, *_FIXED_FIELDS)
        for before, after in [(getattr(old, section), getattr(new, section))]
        for field in _FIXED_FIELDS.get(section, type(before).model_fields)
        if getattr(before, field) != getattr(after, field)
    ]
    changed += [*_changed_mixture(run, old.data, new.data), *_changed_rates(run, old, new)]
    if changed:
        title = f"{run.path}: this run exists with other settings; resuming with these would train a different model:"
        cure = "Give the new experiment another `name` (`init.from` continues from a checkpoint), or remove the folder."
        raise UsageError(listing(title, changed, cure))


def _changed_rates(run: Run, old: Config, new: Config) -> list[str]:
    """Returns how the learning rates of the steps that the run has taken differ; those ahead may change."""
    if (old.optimizer, old.train.max_iters) == (new.optimizer, new.train.max_iters):
        return []
    before, after = (learning_rates(config.optimizer, config.train.max_iters) for config in (old, new))
    first = first_other_rate(before, after, newest_step(run.checkpoints))
    if first is None:
        return []
    return [
        f"schedule: the learning rate of step {first} was {before(first):.3g} and would have been {after(first):.3g}; "
        f"only a run that has taken no more than {first} steps may have it"
    ]


def _changed_mixture(run: Run, old: DataConfig, new: DataConfig) -> list[str]:
    """Returns how the mixtures of the batches that the run has drawn differ; those ahead may change."""
    rolled_back = EventLog.load(run.events_file).last(RolledBack)
    drawn = newest_step(run.checkpoints) + len(rolled_back.skipped if rolled_back else [])
    before, after = ([p.model_dump() for p in data.schedule() if p.from_step < drawn] for data in (old, new))
    if before == after:
        return []
    return [f"weights of the sources before step {drawn}: {before or 'none'} in the run, {after or 'none'} asked for"]


def newest_step(checkpoints: Path) -> int:
    """Returns the step of the newest published checkpoint, damaged or not; 0 without one.

    Raises:
        OSError: The folder cannot be listed.
    """
    return max(_steps(checkpoints), default=0)


def _steps(checkpoints: Path) -> list[int]:
    try:
        names = os.listdir(checkpoints)  # noqa: PTH208  # names only
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(step for name in names if (step := step_in(name)) is not None)
