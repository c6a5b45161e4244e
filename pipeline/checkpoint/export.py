"""A checkpoint as plain weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from pipeline.checkpoint.read import CheckpointReader


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's state dict, float32 on the CPU, by one process and without DeepSpeed, whoever wrote it."""
    reader = CheckpointReader(folder)
    weights = {name: reader.read_whole("weight", name) for name in reader.manifest.parameters}
    reader.close()
    return weights
