"""Datasets that several tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.config.load import dump_config
from pipeline.config.sections import Config
from pipeline.data.build.build import prepare
from tests.data.helpers import SPEECHES, config, documents, jsonl, write


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two sources of different size, many shards, and a validation split."""
    folder = tmp_path_factory.mktemp("dataset")
    write(folder / "a.jsonl", jsonl(documents(300, seed=1)))
    write(folder / "b.jsonl", jsonl(documents(60, seed=2)))
    sources = [
        {"name": "a", "paths": [str(folder / "a.jsonl")], "weight": 1.0},
        {"name": "b", "paths": [str(folder / "b.jsonl")], "weight": 3.0},
    ]
    result = config(folder / "out", sources, slice_size_mb=0.004, validation_fraction=0.1)
    prepare(result)
    return result


@pytest.fixture
def copy(made: Config, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.data.path, tmp_path / "copy"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A config file and the dataset folder that it names."""
    text = write(tmp_path / "a.jsonl", jsonl(SPEECHES) + b"{}\n" + jsonl([""]))
    entry = {"name": "speeches", "paths": [str(text)], "split": "train"}
    made = config(tmp_path / "out", [entry], on_bad="skip", max_bad_fraction=0.5)
    return write(tmp_path / "c.yaml", dump_config(made).encode()), tmp_path / "out"
