"""Compares every byte of a dataset with its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.layout import TOKENIZER
from pipeline.data.manifest import DatasetManifest, Shard
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


def verify_dataset(path: str | Path, progress: ByteCounter | None = None) -> Verified:
    """Reads every file of a dataset and compares it with the manifest.

    Raises:
        DataError: Names every file that is missing or differs from the manifest.
    """
    path = Path(path)
    manifest = DatasetManifest.load(path)
    size = verify_shards(path, manifest.shards, progress, {TOKENIZER: manifest.tokenizer_digest})
    return Verified(2 * len(manifest.shards) + 1, size, manifest.digest)


def verify_shards(
    path: Path, shards: Sequence[Shard], progress: ByteCounter | None = None, more: dict[str, str] | None = None
) -> int:
    """Compares the SHA-256 of shards, their indices and more files, given by name, on all cores.

    Returns:
        The bytes that were read.

    Raises:
        DataError: Names every file that differs.
    """
    expected = dict(more or {})
    for shard in shards:
        expected |= {shard.file: shard.sha256, shard.index: shard.index_sha256}
    sizes = {name: size_of_regular(path / name, path) if is_regular(path / name, path) else 0 for name in expected}
    total, done, problems = sum(sizes.values()), 0, []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = pool.map(lambda name: _problem(path, name, expected[name]), expected)
        for size, problem in zip(sizes.values(), found, strict=True):
            done += size
            if progress is not None:
                progress(done, total)
            if problem is not None:
                problems.append(problem)
    if problems:
        title = f"{path}: {len(problems)} of {len(expected)} files differ from the manifest:"
        raise DataError(listing(title, problems, "Restore them, or remove the folder and prepare the dataset again."))
    return total


def _problem(folder: Path, name: str, digest: str) -> str | None:
    file = folder / name
    try:
        with naming(file, "cannot be read"):
            found = sha256_file(file, folder)
    except PipelineError as error:
        return str(error)
    return None if found == digest else f"{file}: sha256 is {found[:16]}..., not {digest[:16]}..."
