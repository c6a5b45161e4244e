"""A checkpoint that all ranks are writing: hidden until it is whole, then published by one rename."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from pipeline.checkpoint.content import coverage_problem
from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import OWNER_FILE, Manifest, rank_file
from pipeline.errors import CheckpointError, in_words
from pipeline.files import discard, fsync_file, publish_dir, sha256_file, write_json, write_text
from pipeline.run.folder import step_name
from pipeline.text_format import megabytes

_PART_SUFFIX = ".part.json"
_POLL_S = 0.02


@dataclass(frozen=True)
class RankIdentity:
    """Who saves: one rank of one start of the run."""

    rank: int
    """Number of this process."""
    world_size: int
    """Number of processes."""
    zero_stage: int
    """The ZeRO stage of the fragments."""
    start_id: str
    """Names this start of the run; an earlier start that still runs somewhere can no longer publish."""
    store: Store
    """Shared by all ranks of this start: a rank reports its failure here, and rank 0 that it gave up.

    Files cannot carry these messages: a disk that takes no checkpoint takes no message either, and the ranks would wait
    for each other in vain.
    """


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Writes a file of a checkpoint and returns what the manifest says of it: its size and SHA-256."""
    file.touch()
    mode = file.stat().st_mode
    safetensors.torch.save_file(tensors, file)
    file.chmod(mode)  # safetensors makes it the owner's alone, whatever the umask says
    fsync_file(file)
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


class RankFailed(CheckpointError):
    """Another rank ended the save; the message names the rank."""


class PendingCheckpoint:
    """The hidden folder of one save. Rank 0 finds the other ranks' files in it: a thread must not run collectives.

    Args:
        checkpoints: The folder of the run's checkpoints.
        identity: This rank.
        step: Finished optimizer steps.
        number: Number of the save within this start. After a rollback the same step is saved again, and must not meet a
            late rank's file of the first save.
    """

    def __init__(self, checkpoints: Path, identity: RankIdentity, step: int, number: int) -> None:
        self._checkpoints = checkpoints
        self._identity = identity
        self._step = step
        self._number = number
        self._folder = checkpoints / f".{step_name(step)}.{identity.start_id}.{number}.tmp"
        self._failed = f"checkpoint/{identity.start_id}/{number}/failed"
        self._given_up = f"checkpoint/{identity.start_id}/{number}/given_up"

    def remove_older(self) -> None:
        """Deletes what earlier saves of this start left (rank 0): each was published or given up."""
        for folder in self._checkpoints.glob(f".step_*.{self._identity.start_id}.*.tmp"):
            if int(folder.name.split(".")[-2]) < self._number:
                discard(folder)

    def check_space(self, own_bytes: int) -> None:
        """Checks that this rank's file fits; other ranks may have written theirs already, so only its own size counts.

        Raises:
            CheckpointError: It does not fit.
        """
        free = shutil.disk_usage(self._checkpoints).free
        if free < own_bytes:
            whose = "a checkpoint" if self._identity.world_size == 1 else "this rank's part of a checkpoint"
            raise CheckpointError(
                f"{self._checkpoints}: {whose} needs {megabytes(own_bytes)} but only {megabytes(free)} are free; "
                "make room, for example by removing the oldest of the run's checkpoints"
            )

    def write_part(self, fragments: list[OwnedFragment], copies: dict[str, Tensor]) -> None:
        """Writes this rank's file and, beside it, what rank 0 needs to know about it.

        Raises:
            RankFailed: Rank 0 has given up this save, perhaps before the file was begun.
        """
        self._check_wanted()
        self._folder.mkdir(exist_ok=True)
        file = self._folder / rank_file(self._identity.rank)
        part = {
            "file": file.name,
            **write_tensors(file, copies),
            "parameters": {f.name: [list(f.shape), f.dtype, f.start, f.length] for f in fragments},
        }
        write_json(file.with_name(file.name + _PART_SUFFIX), part)
        self._check_wanted()

    def _check_wanted(self) -> None:
        if self._identity.store.check([self._given_up]):
            raise RankFailed(self._identity.store.get(self._given_up).decode())

    def publish(self, state: dict[str, Any], timeout_s: float) -> tuple[Path, str]:
        """Makes the checkpoint visible once the files of all ranks have arrived (rank 0).

        Args:
            state: The rest of the state.
            timeout_s: Longest time to wait for the files.

        Returns:
            The checkpoint's folder, and the digest in its manifest.

        Raises:
            CheckpointError: A rank failed, its file did not arrive, or another start has taken over the folder.
        """
        parts = self._wait_for_parts(timeout_s)
        manifest = _merged(parts, self._step, self._identity, state)
        for part in parts:
            part.unlink()
        digest = manifest.save(self._folder)
        self._check_owner()
        final = self._checkpoints / step_name(self._step)
        replaced = self._folder.with_name(f".{final.name}.replaced.tmp")
        if final.exists():  # the same step before a rollback; a rename cannot replace a folder
            final.rename(replaced)
        publish_dir(self._folder, final)
        discard(replaced)
        self._check_owner()  # the new start may have looked for the newest checkpoint before the rename
        return final, digest

    def _check_owner(self) -> None:
        if (self._checkpoints / OWNER_FILE).read_text() != self._identity.start_id:
            raise CheckpointError(_superseded(self._checkpoints))

    def _wait_for_parts(self, timeout_s: float) -> list[Path]:
        parts = [self._folder / (rank_file(rank) + _PART_SUFFIX) for rank in range(self._identity.world_size)]
        deadline = time.monotonic() + timeout_s
        while True:
            if self._identity.store.check([self._failed]):
                raise RankFailed(self._identity.store.get(self._failed).decode())
            if all(part.exists() for part in parts):
                return parts
            if time.monotonic() > deadline:
                missing = ", ".join(part.name.removesuffix(_PART_SUFFIX) for part in parts if not part.exists())
                raise CheckpointError(f"{self._folder}: {missing} did not arrive in {timeout_s / 60:g} minutes")
            time.sleep(_POLL_S)

    def fail(self, error: Exception) -> str:
        """Gives up the save: rank 0 deletes the folder, any other rank tells it why; returns the error with its place.

        A rank that finishes after rank 0 gave up deletes the folder too. Until then it leaves everything as it is: its
        part may be whole, and rank 0 about to publish it.
        """
        identity = self._identity
        problem = in_words(error)
        if identity.world_size > 1 and not isinstance(error, RankFailed):
            problem = f"rank {identity.rank} on {socket.gethostname()}: {problem}"
        late = False
        with contextlib.suppress(RuntimeError):  # the store ended with rank 0, and no rank waits any longer
            # Announced before the folder is deleted: a rank that has not heard it when its file is complete had written
            # that file before the deletion, which removes it.
            identity.store.set(self._given_up if identity.rank == 0 else self._failed, problem)
            late = identity.store.check([self._given_up])
        if identity.rank == 0 or late:
            discard(self._folder)
        return problem


def take_over(checkpoints: Path, start_id: str) -> None:
    """Makes a new start the owner of the folder (rank 0): deletes leftovers; an older start can no longer publish."""
    write_text(checkpoints / OWNER_FILE, start_id)
    for leftover in checkpoints.glob(".step_*.tmp"):
        discard(leftover)


def lost_to(checkpoints: Path, start_id: str) -> str | None:
    """Returns the message for a start that another one has taken the folder over from; None while it owns it."""
    try:
        owner = (checkpoints / OWNER_FILE).read_text()
    except OSError:  # it tells nothing about the owner: the next look will
        return None
    return None if owner == start_id else _superseded(checkpoints)


def _superseded(checkpoints: Path) -> str:
    return f"{checkpoints}: another start of this run has taken over; this one ends and writes nothing more"


def _merged(parts: list[Path], step: int, identity: RankIdentity, state: dict[str, Any]) -> Manifest:
    files: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for path in parts:  # one at a time in memory
        part = json.loads(path.read_bytes())
        files[part["file"]] = {"bytes": part["bytes"], "sha256": part["sha256"]}
        for name, (shape, dtype, start, length) in part["parameters"].items():
            entry = parameters.setdefault(name, {"shape": shape, "dtype": dtype, "fragments": []})
            # A tuple: the garbage collector, which halts training, stops tracking tuples of plain values, never lists.
            entry["fragments"].append((part["file"], start, length))
    for name, entry in parameters.items():
        problem = coverage_problem(entry["shape"], ((start, length) for _, start, length in entry["fragments"]))
        if problem is not None:
            raise CheckpointError(f"{name} {entry['shape']}: {problem}; nothing is published")
    return Manifest(step, identity.world_size, identity.zero_stage, files, parameters, state)
