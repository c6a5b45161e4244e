"""The average of the weights of several checkpoints: a checkpoint without moments, computed block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.layout import Manifest, rank_file
from pipeline.checkpoint.pending import write_tensors
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.weights import shards
from pipeline.errors import UsageError

WEIGHTINGS = ("uniform", "1-sqrt")
FILE_BYTES = 1 << 30
"""The most that a file holds, and the most that is in memory, unless one parameter alone is larger."""

_BLOCK = 1 << 22  # elements that are averaged at a time, in float64


def shares(count: int, weighting: str) -> list[float]:
    """Returns how much each checkpoint counts, the oldest first; together 1.

    Args:
        count: Number of checkpoints.
        weighting: `uniform`, or `1-sqrt`: what training did between two checkpoints counts as much as under a decay of
            that form over all of them, sqrt(k / n) - sqrt((k - 1) / n).

    Source: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging".
    """
    if weighting == "uniform":
        return [1 / count] * count
    return [math.sqrt((k + 1) / count) - math.sqrt(k / count) for k in range(count)]


def write_average(folder: Path, checkpoints: Sequence[Path], weighting: str, state: dict[str, Any]) -> None:
    """Writes a checkpoint whose weights are an average, rounded once, of sums in float64.

    Args:
        folder: An empty folder, which the caller publishes.
        checkpoints: The checkpoints, the oldest first; their files are trusted (see `verify`).
        weighting: How much each of them counts.
        state: What else the manifest holds.

    Raises:
        UsageError: They are not of one model.
        CheckpointError: A file is damaged.
    """
    counts = shares(len(checkpoints), weighting)
    newest = Manifest.load(checkpoints[-1])
    parameters: dict[str, dict[str, Any]] = {}
    files: dict[str, dict[str, Any]] = {}
    with ExitStack() as opened:
        readers = [opened.enter_context(closing(CheckpointReader(checkpoint))) for checkpoint in checkpoints]
        _refuse_other_models(readers)
        for number, names in enumerate(shards(checkpoints[-1], torch.float32, FILE_BYTES)):
            file = folder / rank_file(number)
            tensors = {f"weight/{name}": _average(readers, counts, name) for name in names}
            files[file.name] = write_tensors(file, tensors)
            for name in names:
                whole = [file.name, 0, tensors[f"weight/{name}"].numel()]
                parameters[name] = {**newest.parameters[name], "fragments": [whole]}
    Manifest(newest.step, len(files), 0, files, parameters, state).save(folder)


def _refuse_other_models(readers: Sequence[CheckpointReader]) -> None:
    shapes = [{name: p["shape"] for name, p in reader.manifest.parameters.items()} for reader in readers]
    for reader, found in zip(readers, shapes, strict=True):
        if found != shapes[-1]:
            raise UsageError(
                f"{reader.folder}: is of another model than {readers[-1].folder}; average those of one run"
            )


def _average(readers: Sequence[CheckpointReader], counts: Sequence[float], name: str) -> Tensor:
    """Returns the average of a flattened parameter."""
    result = torch.empty(math.prod(readers[-1].manifest.parameters[name]["shape"]))
    for start in range(0, result.numel(), _BLOCK):
        block = result[start : start + _BLOCK]
        total = torch.zeros(block.numel(), dtype=torch.float64)
        for reader, count in zip(readers, counts, strict=True):
            reader.read("weight", name, start, block)
            total.add_(block.double(), alpha=count)
        block.copy_(total)
    return result
