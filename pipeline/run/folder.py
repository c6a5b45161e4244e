"""The run folder: the only code that knows its file names (a contract, documented in docs/run-folder.md)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import dump_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import PipelineError, UsageError
from pipeline.files import read_json, write_json, write_text

# What the weights after step t are a function of. Everything else (intervals, ZeRO stage, micro-batch,
# device, tracking ...) may change between two starts of one run.
_FIXED_SECTIONS = ("tokenizer", "model")
_FIXED_FIELDS = {
    "data": ("path", "order", "mixing"),
    "train": ("batch_size", "seed", "precision"),
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
    ),
}


CHECKPOINT_MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    """Returns the folder name of the checkpoint after this many steps."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Run:
    """Paths of one run, all below its folder."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return Path(os.path.abspath(self.path)).name  # noqa: PTH100  # `.` has no name; a link keeps its own

    @property
    def config_file(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def provenance_file(self) -> Path:
        """Commit, package versions, hosts, dataset digest: one entry a start."""
        return self.path / "provenance.json"

    @property
    def metrics_file(self) -> Path:
        """A line a logged step; the source of truth."""
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        """Started, resumed, checkpointed, stopped, finished ..."""
        return self.path / "events.jsonl"

    @property
    def mlflow_file(self) -> Path:
        """Id of the MLflow run and how far it has been fed."""
        return self.path / "mlflow.json"

    @property
    def tracking(self) -> Path:
        """What tracking needs between two starts: locks, repeated lines, system metrics of each node."""
        return self.path / "tracking"

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer.json the run was trained with."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """One folder a checkpoint, visible only when whole."""
        return self.path / "checkpoints"

    @property
    def bad_batches(self) -> Path:
        """What the guards set aside: one JSON file a batch."""
        return self.path / "bad_batches"

    @property
    def samples(self) -> Path:
        """Generated text."""
        return self.path / "samples"

    @property
    def code(self) -> Path:
        """The code that was submitted, so that editing the checkout cannot change a queued job."""
        return self.path / "code"

    @property
    def exports(self) -> Path:
        """Models in the formats of other programs."""
        return self.path / "export"

    @property
    def evaluation_file(self) -> Path:
        """The result of the last `pipeline evaluate`."""
        return self.path / "evaluation.json"

    @property
    def launch(self) -> Path:
        """What jobs are made of: batch scripts, what submitit keeps, and the two files below."""
        return self.path / "launch"

    @property
    def jobs_file(self) -> Path:
        """The Slurm jobs that were submitted for the run."""
        return self.launch / "jobs.json"

    @property
    def attempts_file(self) -> Path:
        """What became of every attempt of a job; a line each time."""
        return self.launch / "attempts.jsonl"

    @property
    def logs(self) -> Path:
        """What jobs printed: a folder a Slurm job, a file an attempt and rank."""
        return self.path / "logs"

    @property
    def report_file(self) -> Path:
        """The self-contained report page."""
        return self.path / "report.html"

    def config(self) -> Config:
        """The config the run was made with."""
        return parse_config(self.config_file.read_text(encoding="utf-8"), source=str(self.config_file))

    def provenance(self) -> list[dict[str, Any]]:
        """One entry a start of the run, oldest first."""
        return read_json(self.provenance_file)["starts"] if self.provenance_file.exists() else []

    def add_provenance(self, start: dict[str, Any]) -> None:
        """Appends what is known about this start."""
        write_json(self.provenance_file, {"starts": [*self.provenance(), start]})


def run_for(config: Config) -> Run:
    """The run a config names, whether it exists or not."""
    return Run(Path(config.runs_dir) / config.name)


def open_run(path: str | Path) -> Run:
    """An existing run, by its folder.

    Raises:
        UsageError: There is no run at this place.
    """
    run = Run(Path(path))
    if run.config_file.is_file():
        return run
    parent = Path(path) if Path(path).is_dir() else Path(path).parent
    near = sorted(str(p.parent) for p in parent.glob("*/config.yaml"))
    hint = f"; runs beside it: {', '.join(near)}" if near else ""
    raise UsageError(f"{path}: is not a run folder (it has no config.yaml){hint}")


def create_run(config: Config) -> Run:
    """Makes the run folder, or opens it where the run exists already.

    Raises:
        UsageError: The run exists with settings that would change what is trained.
        PipelineError: The folder cannot be written.
    """
    run = run_for(config)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        if not os.access(run.path, os.W_OK):
            raise PermissionError(13, "Permission denied")
        if run.config_file.exists():
            _refuse_other_experiment(run, config)
        if not run.config_file.exists() or run.config() != config:
            write_text(run.config_file, dump_config(config))
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise PipelineError(
            f"{run.path}: the run folder cannot be written ({error.strerror}); choose another `runs_dir`"
        ) from error
    return run


def _refuse_other_experiment(run: Run, config: Config) -> None:
    old, new = run.config(), config
    changed = [
        f"  {section}.{field}: {getattr(before, field)!r} in the run, {getattr(after, field)!r} asked for"
        for section in (*_FIXED_SECTIONS, *_FIXED_FIELDS)
        for before, after in [(getattr(old, section), getattr(new, section))]
        for field in _FIXED_FIELDS.get(section, type(before).model_fields)
        if getattr(before, field) != getattr(after, field)
    ]
    if changed:
        raise UsageError(
            "\n".join(
                [
                    f"{run.path}: this run exists with other settings; going on with these would train something else:",
                    *changed,
                    "Give the new experiment another `name`, or remove the folder.",
                ]
            )
        )
