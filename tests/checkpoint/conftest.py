"""A folder of checkpoints that a start owns, and writing that waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from pipeline.checkpoint.pending import take_over


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    take_over(tmp_path, "a1")
    return tmp_path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds back the writing of files until it is set."""
    opened, real = threading.Event(), safetensors.torch.save_file

    def held(*args: Any) -> None:
        opened.wait()
        real(*args)

    monkeypatch.setattr(safetensors.torch, "save_file", held)
    yield opened
    opened.set()
