"""Reading checkpoints: whether one is whole, and any part of any parameter, however many ranks wrote it."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.layout import Fragment, Manifest, UnreadableCheckpoint, published, reading
from pipeline.errors import CheckpointError, listing
from pipeline.files import sha256_file, size_of_regular


class CheckpointReader:
    """Reads parts of parameters from a checkpoint's memory-mapped files; holds only what is asked for.

    Args:
        folder: The checkpoint; its files are trusted (see `verify`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self._files: dict[str, Any] = {}

    def read(self, key: str, name: str, start: int, out: Tensor) -> None:
        """Copies elements `[start, start + len(out))` of a flattened parameter, or of its moment, into `out`.

        Args:
            key: `weight`, `exp_avg` or `exp_avg_sq`.
            name: Name of the parameter.
            start: First element.
            out: One-dimensional, contiguous or not, on any device.

        Raises:
            CheckpointError: The checkpoint does not hold the range, or a file is not what the manifest says.
        """
        if name not in self.manifest.parameters:
            raise CheckpointError(f"{self.folder}: holds no parameter {name}; it is a checkpoint of another model")
        stop, filled = start + out.numel(), 0
        for fragment in self.manifest.fragments(name):
            low, high = max(start, fragment.start), min(stop, fragment.start + fragment.length)
            if low < high:
                source = self._tensor(fragment, f"{key}/{name}")
                out[low - start : high - start].copy_(source[low - fragment.start : high - fragment.start])
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(f"{self.folder}: holds only {filled} of the {out.numel()} elements of {key}/{name}")

    def read_whole(self, key: str, name: str) -> Tensor:
        """Returns a whole parameter in its shape, float32 on the CPU."""
        shape = self.manifest.parameters[name]["shape"]
        flat = torch.empty(self._size_of(name, shape))
        self.read(key, name, 0, flat)
        return flat.view(shape)

    def _size_of(self, name: str, shape: list[int]) -> int:
        """Returns the elements of a shape, after checking that the files can hold them: a manifest may claim any."""
        numel, held = math.prod(shape), sum(file["bytes"] for file in self.manifest.files.values())
        if 4 * numel > held:
            raise CheckpointError(f"{self.folder}: {name} {shape} is larger than all files of the checkpoint")
        return numel

    def close(self) -> None:
        """Unmaps the files."""
        self._files.clear()

    def _tensor(self, fragment: Fragment, key: str) -> Any:
        """Returns the stored fragment of `KEY/NAME`, which must be as long as the manifest says."""
        path = self.folder / fragment.file
        try:
            with reading(path):
                if fragment.file not in self._files:
                    size_of_regular(path, self.folder)  # safe_open would wait for the writer of a FIFO
                    self._files[fragment.file] = safe_open(path, framework="pt")
                found = self._files[fragment.file].get_slice(key)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: is damaged ({error})") from error
        # PyTorch would spread a tensor of one element over the whole fragment.
        if found.get_shape() != [fragment.length] or found.get_dtype() != "F32":
            stored = f"{found.get_dtype()} {found.get_shape()}"
            raise CheckpointError(f"{path}: holds {key} as {stored} instead of F32 [{fragment.length}]")
        return found


def verify(folder: Path, mine: Callable[[int], bool] = lambda index: True, threads: int = 4) -> Manifest:
    """Checks a checkpoint's manifest, and the size and SHA-256 of its files.

    Args:
        folder: The checkpoint.
        mine: Selects the files, by index, that this process checks: ranks share the work.
        threads: Number of files checked at once.

    Raises:
        UnreadableCheckpoint: The storage does not answer.
        CheckpointError: A file is missing or damaged; the message names it.
    """
    manifest = Manifest.load(folder)
    files = [file for index, file in enumerate(sorted(manifest.files)) if mine(index)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda file: _check_file(folder / file, manifest.files[file]), files))
    return manifest


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    with reading(path):
        size = size_of_regular(path, path.parent)
        if size != expected["bytes"]:
            raise CheckpointError(f"{path}: is torn: {size} bytes of {expected['bytes']}")
        if sha256_file(path, path.parent) != expected["sha256"]:
            raise CheckpointError(f"{path}: is damaged: its SHA-256 does not match the manifest's")


def newest_checkpoint(checkpoints: Path) -> Path:
    """Returns the newest checkpoint that is whole, checked byte for byte.

    Raises:
        CheckpointError: There is none; the message says what is wrong with each.
    """
    problems = []
    for folder in published(checkpoints):
        try:
            verify(folder)
        except UnreadableCheckpoint:
            raise
        except CheckpointError as error:
            problems.append(error)
        else:
            return folder
    if not problems:
        raise CheckpointError(f"{checkpoints}: holds no checkpoint; train the run first")
    raise CheckpointError(listing(f"{checkpoints}: holds no checkpoint that can be trusted:", problems))
