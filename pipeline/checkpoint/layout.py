"""The names inside `checkpoints/`, and the content of a checkpoint's manifest.

    checkpoints/step_00001000/              visible only when whole
        manifest.json                       everything about the state, with a digest of itself
        rank_00000.safetensors              the fragments that rank wrote
    checkpoints/.step_00001000.ab12.1.tmp/  being written: the first save of the start ab12
    checkpoints/step_00001000.rejected/     quarantined, kept for inspection
    checkpoints/step_00001000.pin.*.json    another run needs this one (`pins.py`)
    checkpoints/.attempt                    the id of the start that owns the folder

A tensor in a rank's file is `KEY/NAME`: KEY is `weight`, `exp_avg` or `exp_avg_sq`, NAME a parameter. It holds
the elements `[start, start + length)` of the flattened parameter in float32, as the manifest says.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint import content as manifest_content
from pipeline.errors import STORAGE_FAILS, CheckpointError
from pipeline.files import naming, parse_json, read_bounded, sha256_bytes, write_bytes
from pipeline.run.folder import CHECKPOINT_MANIFEST, step_in

FORMAT_VERSION = 1
KEYS = ("weight", "exp_avg", "exp_avg_sq")
OWNER_FILE = ".attempt"


# A file that may not be read may be whole.
_NO_ANSWER = STORAGE_FAILS | {errno.EACCES}


class UnreadableCheckpoint(CheckpointError):
    """A checkpoint cannot be read now; nothing is known against it, so that none before it may take its place."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Names the file of a checkpoint that cannot be read in the block.

    Raises:
        UnreadableCheckpoint: The storage does not answer.
        CheckpointError: The file is missing, or is none.
    """
    try:
        with naming(path, "cannot be read", error=CheckpointError):
            yield
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _NO_ANSWER:
            raise
        cure = "start again when the storage answers, or move this checkpoint away to resume from the one before it"
        raise UnreadableCheckpoint(f"{error}; {cure}") from error.__cause__


@dataclass(frozen=True)
class Fragment:
    """A part of a flattened parameter: elements `[start, start + length)`, in one rank's file."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    step: int
    """Finished optimizer steps."""
    world_size: int
    """Number of processes that wrote the checkpoint."""
    zero_stage: int
    """The ZeRO stage of these processes."""
    files: dict[str, dict[str, Any]]
    """Size and SHA-256 of each file."""
    parameters: dict[str, dict[str, Any]]
    """Shape, dtype and fragments of each parameter."""
    state: dict[str, Any]
    """What else a run needs to resume: tokens seen, skipped batches, RNG, digests, config, the MLflow run's id."""

    def fragments(self, name: str) -> list[Fragment]:
        """Returns the fragments of a parameter, ordered by their start."""
        return sorted((Fragment(*f) for f in self.parameters[name]["fragments"]), key=lambda f: f.start)

    def save(self, folder: Path) -> str:
        """Writes manifest.json with a digest of itself; returns the digest, which names the whole checkpoint."""
        content = _encoded({"format_version": FORMAT_VERSION, **vars(self)})
        digest = sha256_bytes(content)
        write_bytes(folder / CHECKPOINT_MANIFEST, content.removesuffix(b"}") + _seal(digest))
        return digest

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Returns the manifest of a checkpoint; see `load_named`."""
        return cls.load_named(folder)[0]

    @classmethod
    def load_named(cls, folder: Path) -> tuple[Manifest, str]:
        """Reads and checks manifest.json, which may come from anyone: every value, and that fragments cover exactly.

        Returns:
            The manifest and its digest, which names the whole checkpoint.

        Raises:
            UnreadableCheckpoint: The storage does not answer.
            CheckpointError: It is missing, damaged or of another format.
        """
        path = folder / CHECKPOINT_MANIFEST
        try:
            with reading(path):
                content = read_bounded(path, folder)
            tree = parse_json(content)
        except ValueError as error:
            raise CheckpointError(f"{path}: is damaged ({error})") from error
        if not isinstance(tree, dict) or tree.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{path}: is not of format {FORMAT_VERSION}, the only one this program reads")
        digest = tree.pop("digest", None)
        if not _is_intact(content, digest, tree):
            raise CheckpointError(f"{path}: is damaged (its digest does not match its content)")
        tree.pop("format_version")
        problem = manifest_content.problem(tree)
        if problem is not None:
            raise CheckpointError(f"{path}: is damaged ({problem})")
        return cls(**tree), digest


def rank_file(rank: int) -> str:
    """Returns the name of the file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def step_of(folder: Path) -> int | None:
    """Returns the step that a folder's name claims; None if the folder is not a published checkpoint."""
    return step_in(folder.name)


def published(checkpoints: Path) -> list[Path]:
    """Returns the published checkpoints, newest first; none where there is no folder.

    Raises:
        OSError: The folder cannot be listed: newer versions of Python's glob would find it empty.
    """
    try:
        paths = [checkpoints / name for name in os.listdir(checkpoints)]  # noqa: PTH208  # names only
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(step, path) for path in paths if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found, reverse=True)]


def _encoded(tree: dict[str, Any]) -> bytes:
    """Returns `json.dumps(tree, sort_keys=True)`, encoded one parameter at a time.

    The fragments of a thousand ranks are tens of megabytes: encoding them in one call holds the interpreter, and with
    it the training loop, for a second.
    """
    return _object({k: _object(_texts(v)) if isinstance(v, dict) else json.dumps(v) for k, v in tree.items()}).encode()


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value, sort_keys=True) for name, value in values.items()}


def _object(texts: dict[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in sorted(texts.items())) + "}"


def _seal(digest: str) -> bytes:
    """Returns the end of a manifest: the digest covers everything before it, closed by a brace."""
    return f', "digest": "{digest}"}}\n'.encode()


def _is_intact(content: bytes, digest: Any, tree: dict[str, Any]) -> bool:
    seal = _seal(digest)
    if content.endswith(seal) and sha256_bytes(content.removesuffix(seal) + b"}") == digest:
        return True
    return sha256_bytes(_encoded(tree)) == digest  # the same JSON in another layout: earlier versions indented it
