"""Saving in the background: state is copied while the next step computes and published whole or not at all."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.host_copy import HostCopy, OwnedFragment, device_event
from pipeline.checkpoint.pending import PendingCheckpoint, RankIdentity, lost_to
from pipeline.checkpoint.retention import Retention
from pipeline.config.train_sections import CheckpointConfig
from pipeline.errors import CheckpointError
from pipeline.run.exchange import gather_values

_log = logging.getLogger("pipeline.checkpoint")


@dataclass(frozen=True)
class Saved:
    """The outcome of a save, reported once, on rank 0."""

    step: int
    """Finished optimizer steps."""
    path: Path | None
    """The published folder; None if the save failed."""
    error: str | None
    """Why the save failed, or None."""
    seconds: float
    """Seconds from the request until the checkpoint was durable."""
    digest: str | None = None
    """The digest in the manifest, which names the whole content; None if the save failed."""


@dataclass(frozen=True)
class _Request:
    step: int
    fragments: list[OwnedFragment]
    state: dict[str, Any]


class CheckpointSaver:
    """Saves one checkpoint at a time in its own thread.

    Weights and moments change only inside the optimizer step, so their copy to host memory can overlap the next
    forward and backward (DataStates-LLM, HPDC 2024); `wait_for_copy` belongs right before that step.

    Args:
        checkpoints: The folder of the run's checkpoints.
        identity: This rank.
        config: Retention and policies.
        report: Called on rank 0, from the saving thread, with the outcome of each save.
        rollback_steps: How many steps before the newest checkpoint a rollback may have to start from; 0 if the run
            never rolls back.
        interval: Steps between two checkpoints, but for those of a stop.
    """

    def __init__(
        self,
        checkpoints: Path,
        identity: RankIdentity,
        config: CheckpointConfig,
        report: Callable[[Saved], None],
        rollback_steps: int = 0,
        interval: int = 1,
    ) -> None:
        self._checkpoints = checkpoints
        self._identity = identity
        self._config = config
        self._report = report
        self._retention = Retention(checkpoints, config, rollback_steps, interval)
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._host_copy = HostCopy()
        self._deferred: _Request | None = None
        self._failure: str | None = None
        self._died: str | None = None
        self._failures = 0  # in a row
        self._saves = 0
        self._began = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def reserve(self, fragments: list[OwnedFragment]) -> None:
        """Allocates the host memory of all saves now: pinning it during the first one would stall a step for long.

        Raises:
            CheckpointError: There is not enough memory to pin.
        """
        self._host_copy.reserve(fragments)

    def save(self, step: int, fragments: list[OwnedFragment], state: dict[str, Any]) -> None:
        """Begins a save. If one is still in progress, waits for it first or defers the new one (`checkpoint.if_busy`).

        A deferred save is skipped as soon as weights are about to change, and made by `wait`: the last save of a run,
        and the one before a stop, are never lost.

        Args:
            step: Finished optimizer steps.
            fragments: The fragments that this rank owns.
            state: The rest of the state, as plain values; rank 0's is stored.

        Raises:
            CheckpointError: Another start has taken over, or more saves in a row have failed than `checkpoint` allows;
                raised on all ranks.
        """
        self._skip_deferred()
        if self._config.if_busy == "wait":
            self.wait()
        # Threads end at different moments on different ranks: they agree, at saves only.
        states = self._gather([self.busy, self._reason_to_end()])
        reason = next((reason for _, reason in states if reason is not None), None)
        if reason is not None:
            raise CheckpointError(reason)
        busy = any(busy for busy, _ in states)
        request = _Request(step, fragments, state)
        if busy:
            self._deferred = request
        else:
            self._begin(request)

    def superseded(self) -> str | None:
        """Returns what to say when another start of the run has taken over; None while this one owns it (rank 0)."""
        return lost_to(self._checkpoints, self._identity.start_id)

    def wait_for_copy(self) -> None:
        """Blocks until weights may change again."""
        self._skip_deferred()
        self._copied.wait()

    def wait(self, timeout_s: float | None = None) -> None:
        """Blocks until the save in progress, if any, is durable or has failed, at most `timeout_s` seconds.

        Without a time limit a deferred save is made too.

        Raises:
            CheckpointError: The saving thread ended without reporting the outcome of a save.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._died is not None:
            raise CheckpointError(f"{self._checkpoints}: the thread that saves checkpoints ended: {self._died}")
        if timeout_s is None and self._deferred is not None:
            request, self._deferred = self._deferred, None
            self._begin(request)
            self.wait()

    def _reason_to_end(self) -> str | None:
        """Returns why this rank must end, for want of a durable checkpoint; None if it need not."""
        superseded = self.superseded() if self._identity.rank == 0 else None
        if superseded is not None:
            return superseded
        limit_s = self._config.timeout_min * 60
        if self.busy and time.monotonic() - self._began > limit_s:
            self._failures += 1
            self._failure = (
                f"the save before this one is still being written after {self._config.timeout_min:g} minutes"
            )
        if not self._failures:
            return None
        if self._config.on_failure == "stop":
            return f"a checkpoint could not be saved, and checkpoint.on_failure is stop: {self._failure}"
        if self._failures < self._config.max_failures:
            return None
        return (
            f"{self._failures} saves in a row have failed, as many as checkpoint.max_failures allows; the last one: "
            f"{self._failure}"
        )

    def _begin(self, request: _Request) -> None:
        self._saves += 1
        self._began = time.monotonic()
        self._copied.clear()
        arguments = (request, device_event(request.fragments), self._began)
        self._thread = threading.Thread(target=self._save, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def _skip_deferred(self) -> None:
        if self._deferred is None:
            return
        step, self._deferred = self._deferred.step, None
        if self._identity.rank == 0:
            why = "skipped: the previous checkpoint is still being written (checkpoint.if_busy: skip)"
            self._report(Saved(step, None, why, 0.0))

    def _gather(self, value: list[Any]) -> list[list[Any]]:
        rank = self._identity
        if rank.world_size == 1:
            return [value]
        return gather_values(rank.store, "saving", value, rank.rank, rank.world_size)

    def _save(self, request: _Request, ready: Any, began: float) -> None:
        try:
            self._save_and_report(request, ready, began)
        except Exception as error:  # whatever it is: training must not end as if everything were saved
            self._died = f"{type(error).__name__}: {error}"
            _log.exception("the thread that saves checkpoints ended")

    def _save_and_report(self, request: _Request, ready: Any, began: float) -> None:
        pending = PendingCheckpoint(self._checkpoints, self._identity, request.step, self._saves)
        path, digest, problem = None, None, None
        try:
            try:
                copies = self._host_copy.take(request.fragments, ready)
            finally:
                self._copied.set()
            if self._identity.rank == 0:
                pending.remove_older()
            pending.check_space(sum(t.nbytes for t in copies.values()))
            pending.write_part(request.fragments, copies)
            if self._identity.rank == 0:
                path, digest = pending.publish(request.state, self._config.timeout_min * 60)
        except Exception as error:
            # Any error (safetensors reports a full disk as a bare Exception): if the thread died silently, the run
            # would report that everything is saved.
            problem = pending.fail(error)
        self._failure, self._failures = problem, self._failures + 1 if problem else 0
        if self._identity.rank != 0:
            return
        if path is not None:
            try:  # the new one is whole; the next save retries the deletion
                self._retention.remove_old(path, request.state.get("val_loss"))
            except Exception as error:
                _log.warning("%s: old checkpoints could not be removed (%s)", self._checkpoints, error)
        self._report(Saved(request.step, path, problem, time.monotonic() - began, digest))
