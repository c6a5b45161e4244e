"""The whole weights of a checkpoint: as a state dict, or as one safetensors file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.layout import Manifest
from pipeline.checkpoint.read import CheckpointReader

_SPELLED = {torch.float32: "F32", torch.bfloat16: "BF16"}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


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
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> None:
    """Writes a safetensors file of weights, with one parameter in memory at a time.

    Args:
        path: The file; it is fsynced, but visible while it is being written.
        checkpoint: The folder of the checkpoint.
        metadata: Stored in the file's header.
        rename: Maps a parameter's name to its name in the file.
        reorder: Maps a parameter's name and weight to the weight in the file, of the same shape.
        dtype: Of the weights in the file: float32 or bfloat16.
        names: The parameters to write; None for all.
    """
    reader = CheckpointReader(checkpoint)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    written = reader.manifest.parameters if names is None else names
    for name in written:
        shape = reader.manifest.parameters[name]["shape"]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[rename(name)] = {"dtype": _SPELLED[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in written:
            weight = reorder(name, reader.read_whole("weight", name)).to(dtype).contiguous()
            out.write(weight.view(_BITS[dtype]).numpy().astype(f"<i{dtype.itemsize}", copy=False).data)
        out.flush()
        os.fsync(out.fileno())
    reader.close()


def shards(checkpoint: Path, dtype: torch.dtype, most_bytes: int) -> list[list[str]]:
    """Returns the parameters of a checkpoint in groups of at most this size, in the order of the manifest.

    A parameter that is larger has a group of its own.
    """
    found: list[list[str]] = [[]]
    room = most_bytes
    for name, entry in Manifest.load(checkpoint).parameters.items():
        size = dtype.itemsize * math.prod(entry["shape"])
        if size > room and found[-1]:
            found.append([])
            room = most_bytes
        found[-1].append(name)
        room -= size
    return found
