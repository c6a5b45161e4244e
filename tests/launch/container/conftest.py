"""A working folder with an image and a config, and no cache but the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.container.support import sif

CONFIG = """
name: tiny
data:
  path: tokens
  sources: [{name: text, paths: ["text/*.txt"]}]
tokenizer: {kind: bytes}
model: {vocab_size: 257, context_length: 16, d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32}
optimizer: {learning_rate: 0.01, min_learning_rate: 0.001, warmup_iters: 2, cosine_cycle_iters: 6}
train: {batch_size: 4, micro_batch_size: 4, max_iters: 6}
container: {image: image.sif}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which checksums of images are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder beside the home, on a machine whose /tmp is elsewhere and that has no GPU."""
    (tmp_path / "home").mkdir()
    folder = tmp_path / "work"
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.txt").write_text("text")
    sif(folder / "image.sif")
    (folder / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pipeline.launch.container.binds._ALWAYS_VISIBLE", ())
    for driver in ("_NVIDIA_DRIVER", "_AMD_DRIVER"):
        monkeypatch.setattr(f"pipeline.launch.container.command.{driver}", tmp_path / driver)
    return folder
