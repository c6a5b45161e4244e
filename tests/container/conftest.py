"""A working folder whose jobs run in the CPU image; it lies outside /tmp, so that jobs see only what is bound."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.demo_text import fetch_demo_text
from tests.container.support import ROOT, Jobs, cpu_image


@pytest.fixture(scope="session")
def image() -> Path:
    return cpu_image()


@pytest.fixture(scope="session")
def jobs(image: Path) -> Iterator[Jobs]:
    """The demo experiment, shortened, with its data prepared by a job in the image."""
    text = ROOT / "data" / "demo" / "text"
    fetch_demo_text(text)
    folder = Path(tempfile.mkdtemp(dir=ROOT / "build", prefix="container-tests."))
    try:
        shutil.copy(ROOT / "configs" / "demo.yaml", folder)
        made = Jobs(folder, image, text)
        done = made.inside("prepared", "prepare")
        assert done.returncode == 0, done.stderr
        yield made
    finally:
        shutil.rmtree(folder)
