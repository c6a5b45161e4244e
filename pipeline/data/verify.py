"""Compares every byte of a dataset with its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.manifest import TOKENIZER, Manifest, Shard
from pipeline.errors import DataError
from pipeline.files import sha256_file

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Verified:
    """What was compared.

    Attributes:
        files: Files that were read.
        bytes: Their size together.
        digest: Digest of the dataset.
    """

    files: int
    bytes: int
    digest: str


def verify_dataset(path: str | Path, progress: Report | None = None) -> Verified:
    """Reads every file of a dataset.

    Args:
        path: The dataset folder.
        progress: Called with the bytes done and the bytes in all.

    Raises:
        DataError: Names every file that is missing, or does not hold what the manifest says.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    size = verify_shards(path, manifest.shards, progress, {TOKENIZER: manifest.tokenizer_digest})
    return Verified(2 * len(manifest.shards) + 1, size, manifest.digest)


def verify_shards(
    path: Path, shards: Sequence[Shard], progress: Report | None = None, others: dict[str, str] | None = None
) -> int:
    """Compares the SHA-256 of shards and their indices, on all cores.

    Args:
        path: The dataset folder.
        shards: The shards to read.
        progress: Called with the bytes done and the bytes in all.
        others: Digests of further files, by name.

    Returns:
        The bytes that were read.

    Raises:
        DataError: Names every file that is wrong.
    """
    expected = dict(others or {})
    for shard in shards:
        expected |= {shard.file: shard.sha256, shard.index: shard.index_sha256}
    sizes = {name: (path / name).stat().st_size if (path / name).is_file() else 0 for name in expected}
    total, done, problems = sum(sizes.values()), 0, []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, problem in zip(
            expected, pool.map(_problem, (path / n for n in expected), expected.values()), strict=True
        ):
            done += sizes[name]
            if progress is not None:
                progress(done, total)
            if problem is not None:
                problems.append(f"  {path / name}: {problem}")
    if problems:
        raise DataError(
            "\n".join(
                [
                    f"{path}: {len(problems)} of {len(expected)} files are not what the manifest says:",
                    *problems,
                    "Restore them, or remove the folder and prepare the dataset again.",
                ]
            )
        )
    return total


def _problem(file: Path, digest: str) -> str | None:
    try:
        found = sha256_file(file)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found == digest else f"sha256 is {found[:16]}..., not {digest[:16]}..."
