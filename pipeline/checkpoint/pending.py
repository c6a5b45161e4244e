"""A checkpoint that is being written by all ranks: hidden until it is whole, then published by one rename."""

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
import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import Manifest, rank_file
from pipeline.errors import CheckpointError
from pipeline.files import fsync_file, publish_dir, sha256_file, write_json, write_text
from pipeline.run.folder import step_name

ATTEMPT_FILE = ".attempt"

_PART_SUFFIX = ".part.json"
_POLL_S = 0.02


@dataclass(frozen=True)
class Writer:
    """Who writes: this rank's place and the attempt it belongs to.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        zero_stage: The ZeRO stage of the fragments.
        attempt: Names this start of the run; an earlier one that still runs somewhere cannot publish any more.
        store: Shared by all ranks of this start. By it a rank says that it failed, and rank 0 that it gave up: a disk
            that takes no file takes no message either, and they would wait for each other in vain.
    """

    rank: int
    world_size: int
    zero_stage: int
    attempt: str
    store: Store


class RankFailed(CheckpointError):
    """Another rank ended the save; the message names the rank."""


class Draft:
    """One save's hidden folder; rank 0 finds the others' files in it, for a thread must not meet collectives.

    Args:
        checkpoints: The folder of the run's checkpoints.
        writer: This process.
        step: Of the state.
        number: Of the save in this start: after a rollback the same step comes again, and must not meet a late
            rank's file of the first time.
    """

    def __init__(self, checkpoints: Path, writer: Writer, step: int, number: int) -> None:
        self._checkpoints = checkpoints
        self._writer = writer
        self._step = step
        self._number = number
        self._folder = checkpoints / f".{step_name(step)}.{writer.attempt}.{number}.tmp"
        self._failed = f"checkpoint/{writer.attempt}/{number}/failed"
        self._given_up = f"checkpoint/{writer.attempt}/{number}/given_up"

    def remove_older(self) -> None:
        """Deletes what earlier saves of this start left (rank 0): each was published or given up."""
        for folder in self._checkpoints.glob(f".step_*.{self._writer.attempt}.*.tmp"):
            if int(folder.name.split(".")[-2]) < self._number:
                shutil.rmtree(folder, ignore_errors=True)

    def check_space(self, own_bytes: int) -> None:
        """Looks whether this rank's file fits; the others' may be written already, and are no part of what is free.

        Raises:
            CheckpointError: It does not.
        """
        free = shutil.disk_usage(self._checkpoints).free
        if free < own_bytes:
            whose = "a checkpoint" if self._writer.world_size == 1 else "this rank's part of a checkpoint"
            raise CheckpointError(
                f"{self._checkpoints}: {whose} needs {own_bytes / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
                "make room or lower checkpoint.keep_last"
            )

    def write_part(self, fragments: list[OwnedFragment], copies: dict[str, Tensor]) -> None:
        """Writes this rank's file, and beside it what rank 0 must know about it.

        Raises:
            RankFailed: Rank 0 has given this save up, maybe before the file was begun.
        """
        self._check_wanted()
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / rank_file(self._writer.rank)
        safetensors.torch.save_file(copies, file)
        fsync_file(file)
        part = {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            "parameters": {f.name: [list(f.shape), f.dtype, f.start, f.length] for f in fragments},
        }
        write_json(file.with_name(file.name + _PART_SUFFIX), part)
        self._check_wanted()

    def _check_wanted(self) -> None:
        if self._writer.store.check([self._given_up]):
            raise RankFailed(self._writer.store.get(self._given_up).decode())

    def publish(self, state: dict[str, Any], timeout_s: float) -> tuple[Path, str]:
        """Makes the checkpoint visible when the files of all ranks are there (rank 0).

        Args:
            state: The rest of the state.
            timeout_s: How long to wait for a file.

        Returns:
            Its folder, and the digest in its manifest.

        Raises:
            CheckpointError: A rank failed, its file did not arrive, or another start has taken the folder over.
        """
        parts = self._wait_for_parts(timeout_s)
        manifest = _merged(parts, self._step, self._writer, state)
        for part in parts:
            part.unlink()
        digest = manifest.save(self._folder)
        if (self._checkpoints / ATTEMPT_FILE).read_text() != self._writer.attempt:
            raise CheckpointError(
                f"{self._checkpoints}: another start of this run has taken over; nothing is published"
            )
        final = self._checkpoints / step_name(self._step)
        replaced = self._folder.with_name(f".{final.name}.replaced.tmp")
        if final.exists():  # the same step before a rollback; a rename cannot replace a folder
            final.rename(replaced)
        publish_dir(self._folder, final)
        shutil.rmtree(replaced, ignore_errors=True)
        return final, digest

    def _wait_for_parts(self, timeout_s: float) -> list[Path]:
        parts = [self._folder / (rank_file(rank) + _PART_SUFFIX) for rank in range(self._writer.world_size)]
        deadline = time.monotonic() + timeout_s
        while True:
            if self._writer.store.check([self._failed]):
                raise RankFailed(self._writer.store.get(self._failed).decode())
            if all(part.exists() for part in parts):
                return parts
            if time.monotonic() > deadline:
                missing = ", ".join(part.name.removesuffix(_PART_SUFFIX) for part in parts if not part.exists())
                raise CheckpointError(f"{self._folder}: {missing} did not arrive in {timeout_s / 60:g} minutes")
            time.sleep(_POLL_S)

    def fail(self, error: Exception) -> str:
        """Gives up: rank 0 takes away what was written, the others tell it why; returns the error with its place.

        A rank that is later than rank 0 takes its part away itself. Before rank 0 gave up it leaves all as it is: the
        part may be whole, and rank 0 about to publish it.
        """
        problem = str(error)
        if self._writer.world_size > 1 and not isinstance(error, RankFailed):
            problem = f"rank {self._writer.rank} on {socket.gethostname()}: {problem}"
        late = False
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0, and nobody waits any more
            # Said before the folder goes: who finishes a file without hearing it had finished before, and it goes too.
            self._writer.store.set(self._given_up if self._writer.rank == 0 else self._failed, problem)
            late = self._writer.store.check([self._given_up])
        if self._writer.rank == 0 or late:
            shutil.rmtree(self._folder, ignore_errors=True)
        return problem


def begin_attempt(checkpoints: Path, attempt: str) -> None:
    """Takes the folder over for a new start (rank 0): leftovers go, and an older start cannot publish any more."""
    write_text(checkpoints / ATTEMPT_FILE, attempt)
    for leftover in checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _merged(parts: list[Path], step: int, writer: Writer, state: dict[str, Any]) -> Manifest:
    files: dict[str, dict[str, Any]] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for path in parts:  # one at a time in memory
        part = json.loads(path.read_bytes())
        files[part["file"]] = {"bytes": part["bytes"], "sha256": part["sha256"]}
        for name, (shape, dtype, start, length) in part["parameters"].items():
            entry = parameters.setdefault(name, {"shape": shape, "dtype": dtype, "fragments": []})
            # A tuple: the garbage collector, which halts training, lets go of tuples of plain values, never of lists.
            entry["fragments"].append((part["file"], start, length))
    for name, entry in parameters.items():
        covered = sum(length for _, _, length in entry["fragments"])
        if covered != torch.Size(entry["shape"]).numel():
            raise CheckpointError(f"{covered} elements of {name} {entry['shape']} arrived; nothing is published")
    return Manifest(step, writer.world_size, writer.zero_stage, files, parameters, state)
