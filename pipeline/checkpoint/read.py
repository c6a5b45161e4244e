"""Reading checkpoints: whole or not, and any part of any parameter, however many ranks wrote it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.checkpoint.layout import Manifest, published
from pipeline.errors import CheckpointError
from pipeline.files import sha256_file


class CheckpointReader:
    """Parts of a checkpoint's parameters, read from memory-mapped files: nothing is held but what is asked for.

    Args:
        folder: The checkpoint; its files are trusted (see `verify`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self._files: dict[str, Any] = {}

    def read(self, key: str, name: str, start: int, out: Tensor) -> None:
        """Copies elements `[start, start + len(out))` of a flattened parameter, or of a moment, into `out`.

        Args:
            key: `weight`, `exp_avg` or `exp_avg_sq`.
            name: The parameter.
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
            raise CheckpointError(f"{self.folder}: holds {filled} of {out.numel()} elements asked for of {key}/{name}")

    def read_whole(self, key: str, name: str) -> Tensor:
        """A whole parameter in its shape, float32 on the CPU."""
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
    """Checks a checkpoint's manifest, and size and SHA-256 of its files.

    Args:
        folder: The checkpoint.
        mine: Which files, by their index, this process checks: ranks share the work.
        threads: Files checked at once.

    Raises:
        CheckpointError: Something is missing or damaged; the message names the file.
    """
    manifest = Manifest.load(folder)
    files = [file for index, file in enumerate(sorted(manifest.files)) if mine(index)]
    with ThreadPoolExecutor(threads) as pool:
        for problem in pool.map(lambda file: _file_problem(folder / file, manifest.files[file]), files):
            if problem:
                raise CheckpointError(problem)
    return manifest


def _file_problem(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path}: is torn: {size} bytes of {expected['bytes']}"
        if sha256_file(path) != expected["sha256"]:
            return f"{path}: is damaged: its SHA-256 does not match the manifest's"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None


def newest_checkpoint(checkpoints: Path) -> Path:
    """The newest checkpoint that is whole, checked byte for byte.

    Raises:
        CheckpointError: There is none; the message says what was wrong with each.
    """
    problems = []
    for folder in published(checkpoints):
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return folder
    reasons = "".join(f"\n  {problem}" for problem in problems) or " it is empty; train the run first"
    raise CheckpointError(f"{checkpoints}: holds no checkpoint that can be trusted:{reasons}")
