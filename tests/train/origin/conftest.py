"""The trained run of this process, to branch from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.run.folder import run_for
from tests.train.conftest import Trained
from tests.train.origin.lineage import Lineage


@pytest.fixture
def line(trained: Trained, tmp_path: Path) -> Lineage:
    config = trained.again(tmp_path)
    shutil.copytree(trained.run.path, run_for(config).path)
    return Lineage(config, run_for(config), tmp_path)
