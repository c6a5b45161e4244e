"""Reading checkpoints: whether one is whole, and any part of any parameter, however many ranks wrote it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.layout import Manifest, published
from pipeline.errors import CheckpointError, listing
from pipeline.files import naming, sha256_file


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
            CheckpointError: The fragments do not cover the range.
        """
        stop, filled = start + out.numel(), 0
        for fragment in self.manifest.fragments(name):
            low, high = max(start, fragment.start), min(stop, fragment.start + fragment.length)
            if low < high:
                source = self._open(fragment.file).get_slice(f"{key}/{name}")
                out[low - start : high - start].copy_(source[low - fragment.start : high - fragment.start])
                filled += high - low
        if filled != out.numel():
            raise CheckpointError(f"{self.folder}: holds only {filled} of the {out.numel()} elements of {key}/{name}")

    def read_whole(self, key: str, name: str) -> Tensor:
        """Returns a whole parameter in its shape, float32 on the CPU."""
        shape = self.manifest.parameters[name]["shape"]
        flat = torch.empty(torch.Size(shape).numel())
        self.read(key, name, 0, flat)
        return flat.view(shape)

    def close(self) -> None:
        """Unmaps the files."""
        self._files.clear()

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = safe_open(self.folder / file, framework="pt")
        return self._files[file]


def verify(folder: Path, mine: Callable[[int], bool] = lambda index: True, threads: int = 4) -> Manifest:
    """Checks a checkpoint's manifest, and the size and SHA-256 of its files.

    Args:
        folder: The checkpoint.
        mine: Selects the files, by index, that this process checks: ranks share the work.
        threads: Number of files checked at once.

    Raises:
        CheckpointError: A file is missing or damaged; the message names it.
    """
    manifest = Manifest.load(folder)
    files = [file for index, file in enumerate(sorted(manifest.files)) if mine(index)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda file: _check_file(folder / file, manifest.files[file]), files))
    return manifest


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    with naming(path, "cannot be read", error=CheckpointError):
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path}: is torn: {size} bytes of {expected['bytes']}")
        if sha256_file(path) != expected["sha256"]:
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
        except CheckpointError as error:
            problems.append(error)
        else:
            return folder
    if not problems:
        raise CheckpointError(f"{checkpoints}: holds no checkpoint; train the run first")
    raise CheckpointError(listing(f"{checkpoints}: holds no checkpoint that can be trusted:", problems))
