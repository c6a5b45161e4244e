"""The whole weights of a checkpoint: as a state dict, or as one safetensors file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.checkpoint.read import CheckpointReader


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Returns the model's state dict, float32 on the CPU, read by one process without DeepSpeed, whoever wrote it."""
    reader = CheckpointReader(folder)
    weights = {name: reader.read_whole("weight", name) for name in reader.manifest.parameters}
    reader.close()
    return weights


def write_weights(
    path: Path,
    checkpoint: Path,
    metadata: dict[str, str],
    rename: Callable[[str], str] = lambda name: name,
    reorder: Callable[[str, Tensor], Tensor] = lambda name, weight: weight,
) -> None:
    """Writes a safetensors file of float32 weights, with one parameter in memory at a time.

    Args:
        path: The file; it is fsynced, but visible while it is being written.
        checkpoint: The folder of the checkpoint.
        metadata: Stored in the file's header.
        rename: Maps a parameter's name to its name in the file.
        reorder: Maps a parameter's name and weight to the weight in the file, of the same shape.
    """
    reader = CheckpointReader(checkpoint)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, entry in reader.manifest.parameters.items():
        start, end = end, end + 4 * math.prod(entry["shape"])
        header[rename(name)] = {"dtype": "F32", "shape": entry["shape"], "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in reader.manifest.parameters:
            out.write(reorder(name, reader.read_whole("weight", name)).contiguous().numpy().astype("<f4").data)
        out.flush()
        os.fsync(out.fileno())
    reader.close()
