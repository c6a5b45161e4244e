"""Compares every byte of a dataset with its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest, Shard
from pipeline.data.order.packing import packing_digests
from pipeline.errors import DataError, PipelineError, listing
from pipeline.files import is_regular, naming, sha256_file, size_of_regular

ByteCounter = Callable[[int, int], None]
"""Called with the bytes done and the bytes in total."""


@dataclass(frozen=True)
class Verified:
    """The result of a comparison that found no difference."""

    files: int
    """Number of files that were read."""
    bytes: int
    """Their total size."""
    digest: str
    """Digest of the dataset."""


def verify_dataset(path: str | Path, progress: ByteCounter | None = None, token_folder: str | None = None) -> Verified:
    """Reads every file of a dataset and compares it with the manifest.

    Args:
        path: The dataset folder.
        progress: Told how far it is.
        token_folder: The folder of adopted token files; see `DatasetManifest.tokens_in`.

    Raises:
        DataError: Names every file that is missing or differs from the manifest.
    """
    path = Path(path)
    manifest = DatasetManifest.load(path)
    tokens_in = manifest.tokens_in(path, token_folder)
    more = {TOKENIZER: manifest.tokenizer_digest, **packing_digests(path)}
    parts = [_Part(path, name, digest) for name, digest in more.items()]
    size = verify_shards(path, manifest.shards, manifest.numpy_dtype, progress, parts, tokens_in)
    return Verified(2 * len(manifest.shards) + len(parts), size, manifest.digest)


@dataclass(frozen=True)
class _Part:
    """A file, or a range of its bytes, and its digest."""

    folder: Path
    name: str
    sha256: str
    bytes: range | None = None

    def size(self) -> int:
        """Returns the bytes to read; 0 if there is no such file."""
        if not is_regular(self.folder / self.name, self.folder):
            return 0
        return size_of_regular(self.folder / self.name, self.folder) if self.bytes is None else len(self.bytes)

    def problem(self) -> str | None:
        """Returns how it differs from its digest; None if it does not."""
        file = self.folder / self.name
        try:
            with naming(file, "cannot be read"):
                found = sha256_file(file, self.folder, self.bytes)
        except PipelineError as error:
            return str(error)
        place = "" if self.bytes is None else f", bytes {self.bytes.start} to {self.bytes.stop}"
        return None if found == self.sha256 else f"{file}{place}: sha256 is {found[:16]}..., not {self.sha256[:16]}..."


def verify_shards(
    path: Path,
    shards: Sequence[Shard],
    dtype: np.dtype[Any],
    progress: ByteCounter | None = None,
    more: Sequence[_Part] = (),
    tokens_in: Path | None = None,
) -> int:
    """Compares the SHA-256 of shards, their indices and more files on all cores.

    Returns:
        The bytes that were read.

    Raises:
        DataError: Names every file that differs.
    """
    parts = list(more)
    for shard in shards:
        held = range(shard.offset, shard.offset + shard.tokens * dtype.itemsize)
        # A file of the dataset's own is its shard, so that what follows the tokens is damage too.
        parts.append(_Part(tokens_in or path, shard.file, shard.sha256, None if tokens_in is None else held))
        parts.append(_Part(path, shard.index, shard.index_sha256))
    sizes = [part.size() for part in parts]
    total, done, problems = sum(sizes), 0, []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for size, problem in zip(sizes, pool.map(_Part.problem, parts), strict=True):
            done += size
            if progress is not None:
                progress(done, total)
            if problem is not None:
                problems.append(problem)
    if problems:
        title = f"{path}: {len(problems)} of {len(parts)} files differ from the manifest:"
        raise DataError(listing(title, problems, "Restore them, or remove the folder and prepare the dataset again."))
    return total
