"""A run that was never trained: a dataset of bytes, and checkpoints of freshly drawn weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import KEYS
from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.saver import Saved
from pipeline.config.load import load_config
from pipeline.data.manifest import DatasetManifest
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import Run, create_run
from tests.checkpoint.support import saver
from tests.data.helpers import command
from tests.test_bad_input import experiment


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds config.yaml, text/ and tokens/."""
    folder = tmp_path_factory.mktemp("commands")
    assert command("prepare", experiment(folder)) == 0
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Run:
    """A run without checkpoints, and its dataset in `tmp_path / "tokens"`."""
    shutil.copytree(template / "tokens", tmp_path / "tokens")
    made = create_run(load_config(experiment(tmp_path)))
    shutil.copy(tmp_path / "tokens" / "tokenizer.json", made.tokenizer_file)
    take_over(made.checkpoints, "a1")
    return made


@pytest.fixture
def save(run: Run) -> Callable[..., None]:
    """Writes the checkpoint of one step, trained on this dataset unless another digest is given."""

    def write(step: int, dataset: str | None = None) -> None:
        torch.manual_seed(step)
        fragments = [
            OwnedFragment(name, tuple(weight.shape), 0, dict.fromkeys(KEYS, weight.detach().flatten()))
            for name, weight in TransformerLM(**run.config().model.model_dump()).named_parameters()
        ]
        reports: list[Saved] = []
        one = saver(run.checkpoints, reports)
        one.save(step, fragments, {"dataset": dataset or DatasetManifest.load(Path(run.config().data.path)).digest})
        one.wait()
        assert reports[-1].error is None

    return write
