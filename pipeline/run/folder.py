"""The run folder: the only code that knows its file names (a contract, documented in docs/run-folder.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import CONFIG, dump_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import UsageError, listing
from pipeline.files import naming, write_json, write_text
from pipeline.run.records import EVALUATION, PROVENANCE, Evaluation, read_checked
from pipeline.text_format import located

# What the weights after step t are a function of. Everything else (intervals, ZeRO stage, precision,
# micro-batch, device, tracking ...) may change between two starts of one run.
_FIXED_SECTIONS = ("tokenizer", "model", "init")
_FIXED_FIELDS = {
    "data": ("path", "order", "mixing"),
    "train": ("batch_size", "seed"),
    "optimizer": (
        "learning_rate",
        "min_learning_rate",
        "warmup_iters",
        "cosine_cycle_iters",
        "weight_decay",
        "decay_norms",
        "betas",
        "eps",
        "gradient_clip_val",
        "z_loss",
    ),
}


CHECKPOINT_MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    """Returns the folder name of the checkpoint after this many steps."""
    return f"step_{step:08d}"


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
    evaluation_file = _Below("evaluation.json")
    """The result of the last `pipeline evaluate`."""
    launch = _Below("launch")
    """Batch scripts, submitit's files and the two files below."""
    jobs_file = _Below("launch/jobs.json")
    """The Slurm jobs that were submitted for the run."""
    attempts_file = _Below("launch/attempts.jsonl")
    """The outcome of every attempt of a job: one line per record."""
    logs = _Below("logs")
    """Output of jobs: one folder per Slurm job, one file per attempt and rank."""
    report_file = _Below("report.html")
    """The self-contained report page."""

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


def open_run(path: str | Path) -> Run:
    """Returns the existing run in a folder.

    Raises:
        UsageError: There is no run at this place.
    """
    run = Run(Path(path))
    if run.config_file.is_file():
        return run
    parent = Path(path) if Path(path).is_dir() else Path(path).parent
    near = sorted(str(p.parent) for p in parent.glob("*/config.yaml"))
    hint = f"; runs beside it: {', '.join(near)}" if near else ""
    raise UsageError(f"{located(path)}: is not a run folder (it has no config.yaml){hint}")


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
        if run.config_file.exists():
            _refuse_other_experiment(run, config)
        if not run.config_file.exists() or run.config() != config:
            write_text(run.config_file, dump_config(config))
        run.checkpoints.mkdir(exist_ok=True)
    return run


def _refuse_other_experiment(run: Run, config: Config) -> None:
    old, new = run.config(), config
    changed = [
        f"{section}.{field}: {getattr(before, field)!r} in the run, {getattr(after, field)!r} asked for"
        for section in (*_FIXED_SECTIONS, *_FIXED_FIELDS)
        for before, after in [(getattr(old, section), getattr(new, section))]
        for field in _FIXED_FIELDS.get(section, type(before).model_fields)
        if getattr(before, field) != getattr(after, field)
    ]
    if changed:
        title = f"{run.path}: this run exists with other settings; resuming with these would train a different model:"
        raise UsageError(listing(title, changed, "Give the new experiment another `name`, or remove the folder."))
