"""The commands whose storage fails: how each is started, what may not be visible after it, and what it makes."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import experiment, processes
from tests.processes import Ranks

STEPS = 20
_SETTINGS = {
    "train.max_iters": STEPS, "train.checkpoint_interval": 4, "train.val_interval": 10, "model.num_layers": 1,
    "data.slice_size_mb": 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """One command; a case is a folder that holds everything it reads and writes."""

    name: str

    def begin(self, case: Path) -> None:
        """Makes what the command needs."""
        case.mkdir()

    def under(self, case: Path) -> Path:
        """Returns the folder whose storage fails."""
        return case / "run"

    def start(self, case: Path, log: Path, environ: dict[str, str]) -> Ranks:
        """Starts the command with additional variables."""
        raise NotImplementedError

    def half_written(self, case: Path) -> list[str]:
        """Returns what a reader could take for whole, and is not."""
        return []

    def result(self, case: Path) -> Any:
        """Returns what the command has made, apart from what differs between two starts."""
        raise NotImplementedError


class Prepare(Subject):
    """`pipeline prepare`: a folder of tokens."""

    def under(self, case: Path) -> Path:
        return case / "tokens"

    def start(self, case: Path, log: Path, environ: dict[str, str]) -> Ranks:
        config = _config(case.parent / "shared", case, tokenizer={"kind": "bpe", "train_sample_mb": 0.02})
        return processes.start(["prepare", str(config), f"data.path={case / 'tokens'}"], 1, log, environ)

    def half_written(self, case: Path) -> list[str]:
        from pipeline.data.verify import verify_dataset

        return _broken(case / "tokens" / "manifest.json", lambda: verify_dataset(case / "tokens"))

    def result(self, case: Path) -> Any:
        root = case / "tokens"
        return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}


class Adopt(Subject):
    """`pipeline adopt`: a dataset of token files that others made, which lie where storage fails too."""

    def begin(self, case: Path) -> None:
        from tests.data.adopt.foreign import tokens_of, write_megatron

        super().begin(case)
        tokens_of(case)
        write_megatron(case / "theirs" / "a.bin")

    def under(self, case: Path) -> Path:
        return case

    def start(self, case: Path, log: Path, environ: dict[str, str]) -> Ranks:
        # A start that failed behind its publishing is told so by the next one: the user removes the dataset.
        shutil.rmtree(case / "tokens", ignore_errors=True)
        options = ["--output", "tokens", "--tokenizer", "tokenizer.json", "--validation-fraction", "0.1"]
        arguments = ["adopt", "megatron", "theirs/a.bin", *options]
        return processes.fork(_in_folder, (str(case), arguments), 1, log, environ)

    def half_written(self, case: Path) -> list[str]:
        from pipeline.data.verify import verify_dataset

        manifest, theirs = case / "tokens" / "manifest.json", str(case / "theirs")
        return _broken(manifest, lambda: verify_dataset(case / "tokens", token_folder=theirs))

    def result(self, case: Path) -> Any:
        from pipeline.data.manifest import DatasetManifest

        indices = {file.name: file.read_bytes() for file in (case / "tokens").rglob("*.idx")}
        return indices, DatasetManifest.load(case / "tokens").splits


class Train(Subject):
    """`pipeline train`: a run that starts from nothing."""

    world = 1

    def start(self, case: Path, log: Path, environ: dict[str, str]) -> Ranks:
        return processes.start(["train", str(_prepared(case)), *self.options()], self.world, log, environ)

    def options(self) -> list[str]:
        """Returns the overrides of the config."""
        return []

    def half_written(self, case: Path) -> list[str]:
        from pipeline.checkpoint.layout import published
        from pipeline.checkpoint.read import verify

        found = []
        for folder in published(case / "run" / "checkpoints"):
            found += _broken(folder, lambda folder=folder: verify(folder))
        return found

    def result(self, case: Path) -> Any:
        from pipeline.checkpoint.layout import Manifest, published

        run = case / "run"
        newest = published(run / "checkpoints")[0]
        last = experiment.lines(run / "events.jsonl")[-1]["event"]
        return experiment.curve(run), experiment.validations(run), newest.name, Manifest.load(newest).files, last


class TwoRanks(Train):
    """`pipeline train` on two ranks at ZeRO stage 2."""

    world = 2

    def options(self) -> list[str]:
        return ["train.zero_stage=2"]


class Resume(Train):
    """`pipeline train` of a run that was stopped in the middle."""

    def begin(self, case: Path) -> None:
        half = case.parent / "half"
        if not half.exists():
            half.mkdir()
            config = _prepared(half)
            processes.run(["train", str(config), "train.max_iters=10"], 1, case.parent / "half.log")
        shutil.copytree(half / "run", case / "run")


class ReadTokens(Train):
    """`pipeline train` whose dataset cannot be read."""

    def under(self, case: Path) -> Path:
        return case.parent / "shared" / "tokens"


class Sync(Subject):
    """`pipeline sync`: a run of a few lines, and a store that has nothing of it."""

    def begin(self, case: Path) -> None:
        half = case.parent / "recorded"
        if not half.exists():
            half.mkdir()
            processes.run(["train", str(_prepared(half))], 1, case.parent / "recorded.log")
        shutil.copytree(half / "run", case / "run")

    def under(self, case: Path) -> Path:
        return case

    def start(self, case: Path, log: Path, environ: dict[str, str]) -> Ranks:
        uri = f"sqlite:///{case}/mlflow.db"
        return processes.start(["sync", str(case / "run"), "--uri", uri], 1, log, environ)

    def result(self, case: Path) -> Any:
        import sqlite3

        with sqlite3.connect(case / "mlflow.db") as store:
            points = store.execute("SELECT key, step, value FROM metrics WHERE key NOT LIKE 'wall/%' ORDER BY 1, 2")
            runs = store.execute("SELECT name, status FROM runs")
            return points.fetchall(), runs.fetchall()


class Submit(Subject):
    """`pipeline submit` to a Slurm made of scripts."""

    def begin(self, case: Path) -> None:
        from tests.launch.support import fake_slurm, write_files

        case.mkdir()
        fake_slurm(case / "slurm")
        (case / "work").mkdir()
        write_files(case / "work")

    def under(self, case: Path) -> Path:
        return case / "work"

    def start(self, case: Path, log: Path, environ: dict[str, str]) -> Ranks:
        path = {"PATH": f"{case / 'slurm'}:{os.environ['PATH']}"}
        arguments = ["submit", "config.yaml", "--site", "site.yaml"]
        return processes.fork(_in_folder, (str(case / "work"), arguments), 1, log, environ | path)

    def half_written(self, case: Path) -> list[str]:
        """A chain is submitted whole and remembered, or cancelled."""
        from pipeline.launch.slurm import job_records
        from pipeline.run.folder import Run
        from tests.launch.support import FakeSlurm

        slurm, run = FakeSlurm(case / "slurm"), Run(case / "work" / "runs" / "tiny")
        queued = {str(100 + number) for number in range(1, len(slurm.calls("sbatch")) + 1)}
        queued -= {job for call in slurm.calls("scancel") for job in call.split()}
        known = {job.id for job in job_records.jobs(run)}
        (case / "slurm" / "sbatch.count").unlink(missing_ok=True)
        (case / "slurm" / "calls").unlink(missing_ok=True)
        return [] if queued == known else [f"jobs {sorted(queued)} are queued, {sorted(known)} are remembered"]

    def result(self, case: Path) -> Any:
        from pipeline.launch.slurm import job_records
        from pipeline.run.folder import Run

        run = Run(case / "work" / "runs" / "tiny")
        code = {str(f.relative_to(run.code)): f.read_bytes() for f in run.code.rglob("*.py")}
        return [job.stage for job in job_records.jobs(run)][-3:], code


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Prepare("prepare"), Adopt("adopt"), Train("train"), TwoRanks("two_ranks"), Resume("resume"),
        ReadTokens("read_tokens"), Submit("submit"), Sync("sync"),
    )
}  # fmt: skip


def _config(shared: Path, case: Path, **changes: Any) -> Path:
    return experiment.write_experiment(shared, case, "run", **_SETTINGS, **changes)


def _prepared(case: Path) -> Path:
    shared = case.parent / "shared"
    config = _config(shared, case)
    if not (shared / "tokens" / "manifest.json").exists():
        processes.run(["prepare", str(config)], 1, case.parent / "prepare.log")
    return config


def _broken(path: Path, check: Any) -> list[str]:
    from pipeline.errors import PipelineError

    if not path.exists():
        return []
    try:
        check()
    except PipelineError as error:
        return [f"visible and not whole: {error}"]
    return []


def _in_folder(folder: str, arguments: list[str]) -> None:
    os.chdir(folder)
    processes.command(arguments)
