"""Writing checkpoints in the background: copied while the next step computes, published whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.checkpoint.layout import KEYS, Manifest, rank_file, step_name
from pipeline.checkpoint.retention import remove_old
from pipeline.config import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.files import fsync_file, publish_dir, sha256_file, write_json, write_text

ATTEMPT_FILE = ".attempt"

_PART_SUFFIX = ".part.json"
_FAILED_SUFFIX = ".failed"
_POLL_S = 0.02


@dataclass(frozen=True)
class OwnedFragment:
    """A part of a parameter and of its moments that this rank owns.

    Attributes:
        name: The parameter.
        shape: Shape of the whole parameter.
        start: First element of the part, in the flattened parameter.
        tensors: `weight`, `exp_avg`, `exp_avg_sq`: float32 views `(length,)`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Writer:
    """Who writes: this rank's place and the attempt it belongs to.

    Attributes:
        rank: Number of this process.
        world_size: Number of processes.
        zero_stage: The ZeRO stage of the fragments.
        attempt: Names this start of the run; an earlier one that still runs somewhere cannot publish any more.
    """

    rank: int
    world_size: int
    zero_stage: int
    attempt: str


@dataclass(frozen=True)
class Saved:
    """What came of a save: reported on rank 0, once.

    Attributes:
        step: Of the state.
        path: The published folder; None if the save failed.
        error: Why it failed, or None.
        seconds: From the request to durable.
    """

    step: int
    path: Path | None
    error: str | None
    seconds: float


@dataclass(frozen=True)
class _Request:
    step: int
    fragments: list[OwnedFragment]
    state: dict[str, Any]


class _RankFailed(CheckpointError):
    """Another rank could not write its file; the message names the rank."""


class CheckpointSaver:
    """Saves one checkpoint at a time in a thread of its own.

    Weights and moments change only inside the optimiser step, so that their copy to host memory may overlap the
    next forward and backward (DataStates-LLM, HPDC 2024); `wait_for_copy` goes right before that step.

    Args:
        checkpoints: The folder of the run's checkpoints.
        writer: This process.
        config: Retention and policies.
        report: Called on rank 0 from the thread with what came of each save.
    """

    def __init__(
        self, checkpoints: Path, writer: Writer, config: CheckpointConfig, report: Callable[[Saved], None]
    ) -> None:
        self._checkpoints = checkpoints
        self._writer = writer
        self._config = config
        self._report = report
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._buffers: dict[str, Tensor] = {}
        self._put_off: _Request | None = None
        self._failure: str | None = None
        self._saves = 0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, fragments: list[OwnedFragment], state: dict[str, Any]) -> None:
        """Begins a save; with one still under way it waits for that, or is put off (`checkpoint.if_busy`).

        A save that was put off is skipped as soon as weights are about to change, and made up for by `wait`: the
        last one of a run, and the one before a stop, are never lost.

        Args:
            step: Finished optimizer steps.
            fragments: What this rank owns.
            state: The rest of the state, as plain values; rank 0's is stored.

        Raises:
            CheckpointError: An earlier save failed and `checkpoint.on_failure` is `stop`; on all ranks alike.
        """
        self._skip_put_off()
        skipping, stopping = self._config.if_busy == "skip", self._config.on_failure == "stop"
        if not skipping:
            self.wait()
        busy = False
        failures: list[str | None] = []
        if skipping or stopping:  # threads do not end at the same moment on all ranks: agree, at this step only
            states = self._gather((self.busy, self._failure))
            busy, failures = any(b for b, _ in states), [f for _, f in states]
        failure = next((f for f in failures if f is not None), None)
        if stopping and failure is not None:
            raise CheckpointError(f"a checkpoint could not be saved, and checkpoint.on_failure is stop: {failure}")
        request = _Request(step, fragments, state)
        if busy:
            self._put_off = request
        else:
            self._begin(request)

    def wait_for_copy(self) -> float:
        """Blocks until weights may change again; returns the seconds it took."""
        began = time.perf_counter()
        self._skip_put_off()
        self._copied.wait()
        return time.perf_counter() - began

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the save under way, if there is one, is durable or has failed, or the time is over.

        Without a time limit a save that was put off is made too.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        if timeout_s is None and self._put_off is not None:
            request, self._put_off = self._put_off, None
            self._begin(request)
            self.wait()

    def _begin(self, request: _Request) -> None:
        self._saves += 1
        self._copied.clear()
        ready = _device_event(request.fragments)
        arguments = (request.step, request.fragments, request.state, ready, time.monotonic())
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _skip_put_off(self) -> None:
        if self._put_off is None:
            return
        step, self._put_off = self._put_off.step, None
        if self._writer.rank == 0:
            why = "skipped: the one before it is still being written (checkpoint.if_busy: skip)"
            self._report(Saved(step, None, why, 0.0))

    def _gather(self, value: tuple[bool, str | None]) -> list[tuple[bool, str | None]]:
        if self._writer.world_size == 1:
            return [value]
        values: list[Any] = [None] * self._writer.world_size
        dist.all_gather_object(values, value)
        return values

    def _save(self, step: int, fragments: list[OwnedFragment], state: dict[str, Any], ready: Any, began: float) -> None:
        # Numbered: after a rollback the same step comes again, and must not meet a late rank's file of the first time.
        temp = self._checkpoints / f".{step_name(step)}.{self._writer.attempt}.{self._saves}.tmp"
        path, problem = None, None
        try:
            try:
                copies = self._copy(fragments, ready)
            finally:
                self._copied.set()
            self._check_space(sum(t.nbytes for t in copies.values()))
            temp.mkdir(parents=True, exist_ok=True)
            self._write_part(temp, fragments, copies)
            if self._writer.rank == 0:
                path = self._publish(temp, step, state)
        except Exception as error:
            # Whatever it is (safetensors reports a full disk as a bare Exception): a thread that dies unheard would
            # let the run say that everything is saved.
            problem = self._named(error)
            self._tell_rank_0(temp, problem)
        if self._writer.rank != 0:
            return
        self._failure = problem
        if path is None:
            shutil.rmtree(temp, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # the new one is whole; what could not go now goes after the next
                remove_old(self._checkpoints, self._config)
        self._report(Saved(step, path, problem, time.monotonic() - began))

    def _named(self, error: Exception) -> str:
        if isinstance(error, _RankFailed) or self._writer.world_size == 1:
            return str(error)
        return f"rank {self._writer.rank} on {socket.gethostname()}: {error}"

    def _copy(self, fragments: list[OwnedFragment], ready: Any) -> dict[str, Tensor]:
        """Host copies under their names in the file; the buffers are kept for the next save."""
        with _copy_stream(ready):
            for fragment in fragments:
                for key in KEYS:
                    source = fragment.tensors[key]
                    name = f"{key}/{fragment.name}"
                    if name not in self._buffers or self._buffers[name].numel() != source.numel():
                        self._buffers[name] = torch.empty(source.numel(), pin_memory=source.is_cuda)
                    self._buffers[name].copy_(source.detach(), non_blocking=source.is_cuda)
        return self._buffers

    def _check_space(self, own_bytes: int) -> None:
        needed = own_bytes * self._writer.world_size
        free = shutil.disk_usage(self._checkpoints).free
        if free < needed:
            raise CheckpointError(
                f"{self._checkpoints}: a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
                "make room or lower checkpoint.keep_last"
            )

    def _write_part(self, temp: Path, fragments: list[OwnedFragment], copies: dict[str, Tensor]) -> None:
        file = temp / rank_file(self._writer.rank)
        safetensors.torch.save_file(copies, file)
        fsync_file(file)
        part = {
            "file": file.name,
            "bytes": file.stat().st_size,
            "sha256": sha256_file(file),
            "parameters": {f.name: [list(f.shape), f.start, f.tensors["weight"].numel()] for f in fragments},
        }
        write_json(file.with_name(file.name + _PART_SUFFIX), part)

    def _publish(self, temp: Path, step: int, state: dict[str, Any]) -> Path:
        parts = self._collect_parts(temp)
        manifest = _merged(parts, step, self._writer, state)
        for part in parts:
            (temp / (part["file"] + _PART_SUFFIX)).unlink()
        manifest.save(temp)
        if (self._checkpoints / ATTEMPT_FILE).read_text() != self._writer.attempt:
            raise CheckpointError(
                f"{self._checkpoints}: another start of this run has taken over; nothing is published"
            )
        final = self._checkpoints / step_name(step)
        replaced = temp.with_name(f".{final.name}.replaced.tmp")
        if final.exists():  # the same step before a rollback; a rename cannot replace a folder
            final.rename(replaced)
        publish_dir(temp, final)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def _collect_parts(self, temp: Path) -> list[dict[str, Any]]:
        """Waits for the files of all ranks; ranks tell each other by files, for a thread must not meet collectives."""
        names = [rank_file(rank) for rank in range(self._writer.world_size)]
        deadline = time.monotonic() + self._config.timeout_min * 60
        while True:
            for name in names:
                if (temp / (name + _FAILED_SUFFIX)).exists():
                    raise _RankFailed((temp / (name + _FAILED_SUFFIX)).read_text())
            if all((temp / (name + _PART_SUFFIX)).exists() for name in names):
                return [json.loads((temp / (name + _PART_SUFFIX)).read_bytes()) for name in names]
            if time.monotonic() > deadline:
                missing = [n for n in names if not (temp / (n + _PART_SUFFIX)).exists()]
                raise CheckpointError(
                    f"{temp}: {', '.join(missing)} did not arrive in {self._config.timeout_min:g} minutes"
                )
            time.sleep(_POLL_S)

    def _tell_rank_0(self, temp: Path, problem: str) -> None:
        if self._writer.rank != 0:
            # A full disk has no room for this file either, unless what was written so far goes first.
            with contextlib.suppress(OSError):
                (temp / rank_file(self._writer.rank)).unlink(missing_ok=True)
                write_text(temp / (rank_file(self._writer.rank) + _FAILED_SUFFIX), problem)


def begin_attempt(checkpoints: Path, attempt: str) -> None:
    """Takes the folder over for a new start (rank 0): leftovers go, and an older start cannot publish any more."""
    write_text(checkpoints / ATTEMPT_FILE, attempt)
    for leftover in checkpoints.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _merged(parts: list[dict[str, Any]], step: int, writer: Writer, state: dict[str, Any]) -> Manifest:
    parameters: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, (shape, start, length) in part["parameters"].items():
            entry = parameters.setdefault(name, {"shape": shape, "fragments": []})
            entry["fragments"].append([part["file"], start, length])
    for name, entry in parameters.items():
        covered = sum(length for _, _, length in entry["fragments"])
        if covered != torch.Size(entry["shape"]).numel():
            raise CheckpointError(f"{covered} elements of {name} {entry['shape']} arrived; nothing is published")
    files = {part["file"]: {"bytes": part["bytes"], "sha256": part["sha256"]} for part in parts}
    return Manifest(step, writer.world_size, writer.zero_stage, files, parameters, state)


def _device_event(fragments: list[OwnedFragment]) -> Any:
    """On CUDA, an event after which the weights are those of this step; None on the CPU."""
    if not any(f.tensors["weight"].is_cuda for f in fragments):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def _copy_stream(ready: Any):  # type: ignore[no-untyped-def]
    """On CUDA, a stream of its own for the copies, finished when the block ends."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        yield
    stream.synchronize()
