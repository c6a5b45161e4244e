"""Runs that tests share: experiments on real ranks, and one that this process trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import pipeline.train.loop as loop
import pipeline.train.startup as startup
from pipeline.config.sections import Config
from pipeline.run.folder import Run, run_for
from pipeline.train.session import TrainResult
from tests import experiment, processes
from tests.once import made_once, shared_folder
from tests.train.tiny import tiny


@pytest.fixture(scope="session", autouse=True)
def malloc_as_it_is() -> Iterator[None]:
    """Training keeps all freed memory of its process; the worker has more tests to run, and some of them fork."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "keep_freed_memory", lambda **settings: None)
        yield


class Lab:
    """Trains one tiny experiment on any number of ranks at any ZeRO stage.

    Args:
        folder: Holds the text, the tokens and the runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        """Writes the text and the tokens that all runs share."""
        processes.run(["prepare", str(self.config("data"))], 1, self._folder / "prepare.log")

    def config(self, name: str, **changes: Any) -> Path:
        """Returns the config file of the experiment, for a run of this name."""
        small = {"model.num_layers": 1, "optimizer.gradient_clip_val": 0.8, "train.checkpoint_interval": 50}
        return experiment.write_experiment(self._folder, self._folder / "runs", name, **(small | changes))

    def train(self, name: str, world: int, stage: int, *overrides: str, **changes: Any) -> Path:
        """Starts or resumes a run; returns its folder."""
        arguments = ["train", str(self.config(name, **changes)), f"train.zero_stage={stage}", *overrides]
        processes.run(arguments, world, self._folder / "logs" / f"{name}.log", timeout_s=250)
        return self._folder / "runs" / name

    def uninterrupted(self, world: int, stage: int, precision: str = "fp32") -> Path:
        """Returns the uninterrupted run of this layout."""
        name = f"whole_{world}_{stage}_{precision}"
        settings = experiment.in_precision(precision, world, stage)
        return made_once(self._folder / "runs" / name, lambda: self.train(name, world, stage, **settings))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """One lab for all workers of a test run."""
    folder = shared_folder(tmp_path_factory) / "lab"
    lab = Lab(folder)
    made_once(folder / "tokens", lab.prepare)
    return lab


@dataclass(frozen=True)
class Trained:
    """A run of ten steps that this process trained."""

    config: Config
    config_file: Path
    run: Run
    result: TrainResult

    def again(self, folder: Path) -> Config:
        """Returns the same experiment on the same data as a new run, below another folder."""
        return self.config.model_copy(update={"runs_dir": str(folder / "runs")})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Ten steps of two micro-batches, logged each; a validation after each third, a checkpoint after each fourth."""
    folder = tmp_path_factory.mktemp("trained")
    intervals = {"train.max_iters": 10, "train.val_interval": 3, "train.checkpoint_interval": 4}
    sizes = {"train.batch_size": 8, "train.micro_batch_size": 4, "train.num_val_batches": 2}
    config = tiny(folder, **intervals, **sizes, **{"checkpoint.keep_last": 9, "optimizer.gradient_clip_val": 0.6})
    result = loop.train(config)
    return Trained(config, folder / "config.yaml", run_for(config), result)


@pytest.fixture
def resumable(trained: Trained, tmp_path: Path) -> Config:
    """A copy of the trained run as if it had been killed after its last checkpoint, to be resumed."""
    config = trained.again(tmp_path)
    run = run_for(config)
    shutil.copytree(trained.run.path, run.path)
    lines = run.events_file.read_text().splitlines(keepends=True)
    run.events_file.write_text("".join(line for line in lines if '"finished"' not in line))
    return config
