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
from pipeline.checkpoint.layout import Manifest, rank_file, step_name
from pipeline.errors import CheckpointError
from pipeline.files import fsync_file, publish_dir, sha256_file, write_json, write_text

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
        store: Shared by all ranks of this start. By it a rank says that it failed: a disk that takes no file takes no
            message either, and rank 0 would wait for it in vain.
    """

    rank: int
    world_size: int
    zero_stage: int
    attempt: str
    store: Store


class RankFailed(CheckpointError):
    """Another rank could not write its file; the message names the rank."""


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
        self._folder = checkpoints / f".{step_name(step)}.{writer.attempt}.{number}.tmp"
        self._failure = f"checkpoint/{writer.attempt}/{number}/failed"

    def check_space(self, own_bytes: int) -> None:
        """Looks whether all ranks' files fit, each of about `own_bytes`.

        Raises:
            CheckpointError: They do not.
        """
        needed = own_bytes * self._writer.world_size
        free = shutil.disk_usage(self._checkpoints).free
        if free < needed:
            raise CheckpointError(
                f"{self._checkpoints}: a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
                "make room or lower checkpoint.keep_last"
            )

    def write_part(self, fragments: list[OwnedFragment], copies: dict[str, Tensor]) -> None:
        """Writes this rank's file, and beside it what rank 0 must know about it."""
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

    def publish(self, state: dict[str, Any], timeout_s: float) -> Path:
        """Makes the checkpoint visible when the files of all ranks are there (rank 0); returns its folder.

        Args:
            state: The rest of the state.
            timeout_s: How long to wait for a file.

        Raises:
            CheckpointError: A rank failed, its file did not arrive, or another start has taken the folder over.
        """
        parts = self._collect_parts(timeout_s)
        manifest = _merged(parts, self._step, self._writer, state)
        for part in parts:
            (self._folder / (part["file"] + _PART_SUFFIX)).unlink()
        manifest.save(self._folder)
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
        return final

    def _collect_parts(self, timeout_s: float) -> list[dict[str, Any]]:
        temp = self._folder
        names = [rank_file(rank) for rank in range(self._writer.world_size)]
        deadline = time.monotonic() + timeout_s
        while True:
            if self._writer.store.check([self._failure]):
                raise RankFailed(self._writer.store.get(self._failure).decode())
            if all((temp / (name + _PART_SUFFIX)).exists() for name in names):
                return [json.loads((temp / (name + _PART_SUFFIX)).read_bytes()) for name in names]
            if time.monotonic() > deadline:
                missing = [n for n in names if not (temp / (n + _PART_SUFFIX)).exists()]
                raise CheckpointError(f"{temp}: {', '.join(missing)} did not arrive in {timeout_s / 60:g} minutes")
            time.sleep(_POLL_S)

    def fail(self, error: Exception) -> str:
        """Gives up: rank 0 takes away what was written, the others tell it why; returns the error with its place."""
        problem = str(error)
        if self._writer.world_size > 1 and not isinstance(error, RankFailed):
            problem = f"rank {self._writer.rank} on {socket.gethostname()}: {problem}"
        if self._writer.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
            return problem
        with contextlib.suppress(OSError):
            (self._folder / rank_file(self._writer.rank)).unlink(missing_ok=True)
        with contextlib.suppress(RuntimeError):  # the store is gone with rank 0, and nobody waits any more
            self._writer.store.set(self._failure, problem)
        return problem


def begin_attempt(checkpoints: Path, attempt: str) -> None:
    """Takes the folder over for a new start (rank 0): leftovers go, and an older start cannot publish any more."""
    write_text(checkpoints / ATTEMPT_FILE, attempt)
    for leftover in checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _merged(parts: list[dict[str, Any]], step: int, writer: Writer, state: dict[str, Any]) -> Manifest:
    parameters: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, (shape, dtype, start, length) in part["parameters"].items():
            entry = parameters.setdefault(name, {"shape": shape, "dtype": dtype, "fragments": []})
            entry["fragments"].append([part["file"], start, length])
    for name, entry in parameters.items():
        covered = sum(length for _, _, length in entry["fragments"])
        if covered != torch.Size(entry["shape"]).numel():
            raise CheckpointError(f"{covered} elements of {name} {entry['shape']} arrived; nothing is published")
    files = {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
    return Manifest(step, writer.world_size, writer.zero_stage, files, parameters, state)
