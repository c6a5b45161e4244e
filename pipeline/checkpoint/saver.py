"""Writing checkpoints in the background: copied while the next step computes, published whole or not at all."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.checkpoint.host_copy import HostCopy, OwnedFragment, device_event
from pipeline.checkpoint.pending import Draft, Writer
from pipeline.checkpoint.retention import Retention
from pipeline.config.sections import CheckpointConfig
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """What came of a save: reported on rank 0, once.

    Attributes:
        step: Of the state.
        path: The published folder; None if the save failed.
        error: Why it failed, or None.
        seconds: From the request to durable.
        digest: Names the whole content: the digest in its manifest; None if the save failed.
    """

    step: int
    path: Path | None
    error: str | None
    seconds: float
    digest: str | None = None


@dataclass(frozen=True)
class _Request:
    step: int
    fragments: list[OwnedFragment]
    state: dict[str, Any]


class CheckpointSaver:
    """Saves one checkpoint at a time in a thread of its own.

    Weights and moments change only inside the optimiser step, so that their copy to host memory may overlap the
    next forward and backward (DataStates-LLM, HPDC 2024); `wait_for_copy` goes right before that step.

    Args:
        checkpoints: The folder of the run's checkpoints.
        writer: This process.
        config: Retention and policies.
        report: Called on rank 0 from the thread with what came of each save.
        rollback_steps: How many steps before the newest checkpoint a rollback may have to go back to; 0 where there
            are no rollbacks.
    """

    def __init__(
        self,
        checkpoints: Path,
        writer: Writer,
        config: CheckpointConfig,
        report: Callable[[Saved], None],
        rollback_steps: int = 0,
    ) -> None:
        self._checkpoints = checkpoints
        self._writer = writer
        self._config = config
        self._report = report
        self._retention = Retention(checkpoints, config, rollback_steps)
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._host_copy = HostCopy()
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
        arguments = (request, device_event(request.fragments), time.monotonic())
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

    def _save(self, request: _Request, ready: Any, began: float) -> None:
        draft = Draft(self._checkpoints, self._writer, request.step, self._saves)
        path, digest, problem = None, None, None
        try:
            try:
                copies = self._host_copy.take(request.fragments, ready)
            finally:
                self._copied.set()
            if self._writer.rank == 0:
                draft.remove_older()
            draft.check_space(sum(t.nbytes for t in copies.values()))
            draft.write_part(request.fragments, copies)
            if self._writer.rank == 0:
                path, digest = draft.publish(request.state, self._config.timeout_min * 60)
        except Exception as error:
            # Whatever it is (safetensors reports a full disk as a bare Exception): a thread that dies unheard would
            # let the run say that everything is saved.
            problem = draft.fail(error)
        if self._writer.rank != 0:
            return
        self._failure = problem
        if path is not None:
            with contextlib.suppress(OSError):  # the new one is whole; what could not go now goes after the next
                self._retention.remove_old(path, request.state.get("val_loss"))
        self._report(Saved(request.step, path, problem, time.monotonic() - began, digest))
