"""Keeps metrics.jsonl one final history, however often training goes back to a checkpoint.

MLflow never removes a point. It stores the same (key, step, time, value) once, but a repeated step with another
time becomes a second point. So `History` sets aside the lines that a store may have (the published ones) and that
training is about to repeat. When a step is logged again, its published line returns to the history unchanged, and
the newly measured times are dropped. The new line counts only where the repeated loss differs (a rollback skipped
a batch): its steps are marked as a retry, and their points get keys of their own in MLflow.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from pipeline.run import journal
from pipeline.run.folder import Run
from pipeline.tracking import upload_state

# A restart on a different number of ranks rounds differently; that is not a different result.
_ROUNDING = 1e-2


class History:
    """Writes metrics.jsonl, one object per run, in one process; training is about to repeat the steps after `step`."""

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self._pending_file = run.repeated_file
        self.reached = 0
        self.last_time: float | None = None
        self._step = step
        self._behind: int | None = None  # the step of a rewind that has failed
        self._keys: set[str] = set()
        self._tolerance = _ROUNDING
        self._pending: list[dict[str, Any]] = []
        self._writer: journal.Writer | None = None
        run.tracking.mkdir(parents=True, exist_ok=True)
        journal.repair(run.metrics_file)
        self._go_back(step)

    def rewind(self, step: int) -> None:
        """Rewinds to `step` for a rollback: from here on, repeated losses must agree bit for bit."""
        self._tolerance = 0.0
        self._behind = step
        self._go_back(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the metrics of a step, or the published line of that step if it agrees.

        Raises:
            OSError: The line cannot be written.
        """
        if self._behind is not None:
            self._go_back(self._behind)
        if step < self._step or (step == self._step and not self._keys.isdisjoint(metrics)):
            self.rewind(step - 1)
        earlier = [r for r in self._pending if r["step"] < step]
        same = [r for r in self._pending if r["step"] == step and not metrics.keys().isdisjoint(r)]
        if not all(_agrees(r, metrics, self._tolerance) for r in same):
            self._diverge(step, earlier)
            same = []
        lines = earlier + same
        fresh = {k: v for k, v in metrics.items() if not any(k in r for r in same)}
        if fresh or not same:
            lines = [*lines, {"step": step, "time": round(time.time(), 3), **fresh}]
        assert self._writer is not None
        self._writer.write(b"".join(journal.encode(r) for r in lines))
        if earlier or same:
            self._pending = [r for r in self._pending if not any(r is line for line in lines)]
        self._keys = {*metrics} if step > self._step else self._keys | {*metrics}
        self._step = step
        self.reached = max(self.reached, step)

    def close(self) -> None:
        """Makes the file durable."""
        # Forgotten first: should a part of `_go_back` fail, another file may get the number of the closed descriptor.
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _go_back(self, step: int) -> None:
        """Cuts the lines after `step` and sets aside those that a store may have.

        The order makes a kill between two writes harmless: set the lines aside, lower the position, cut the file.
        """
        self.close()
        kept: list[tuple[int, bytes]] = []
        cut: list[journal.Line] = []
        whole = 0  # bytes at the start of the file that do not change
        for line in journal.read_steps(self._run.metrics_file):
            at = int(line.record["step"])
            self.reached = max(self.reached, at)
            self.last_time = float(line.record["time"])
            if at > step:
                cut.append(line)
                continue
            kept.append((at, line.raw))
            if line.end == whole + len(line.raw):
                whole = line.end

        def lower(s: upload_state.State) -> None:
            nonlocal whole
            self._pending = _merge(
                [line.record for line in journal.read_steps(self._pending_file)],
                [line.record for line in cut if line.end <= s.possibly_published()],
            )
            # Published lines up to `step` that the killed process had not yet put back.
            there = set(kept)
            missing = [(r["step"], journal.encode(r)) for r in self._pending if r["step"] <= step]
            missing = [line for line in missing if line not in there]
            if missing:
                # Everything from the first line put back is sent to the store again.
                whole = sum(len(raw) for at, raw in kept if at < missing[0][0])
                kept[:] = sorted([*kept, *missing], key=lambda line: line[0])
            self._pending = [r for r in self._pending if r["step"] > step]
            aside = [raw for _, raw in missing] + [journal.encode(r) for r in self._pending]
            journal.replace(self._pending_file, aside)
            for store in s.stores.values():
                store.sent, store.sending = min(store.sent, whole), min(store.sending, whole)
            s.generation += 1

        # Cut under the lock: an uploader must not read old lines at the new position.
        upload_state.update(self._run, lower, lambda: journal.replace(self._run.metrics_file, [raw for _, raw in kept]))
        self._writer = journal.Writer(self._run.metrics_file)
        self._step, self._keys, self._behind = step, set(), None

    def _diverge(self, step: int, earlier: list[dict[str, Any]]) -> None:
        last = max(r["step"] for r in self._pending)

        def mark(s: upload_state.State) -> None:
            number = max((r.number for r in s.retries), default=0) + 1
            s.retries.append(upload_state.Retry(number=number, first_step=step, last_step=last))
            s.generation += 1

        upload_state.update(self._run, mark)
        journal.replace(self._pending_file, map(journal.encode, earlier))
        self._pending = earlier  # last: after a full disk this line is logged again, and must differ again


def _agrees(published: Mapping[str, Any], metrics: Mapping[str, float], tolerance: float) -> bool:
    """Returns whether a repeated step has the published losses; times and rates always differ."""
    return all(
        math.isclose(published[key], value, rel_tol=tolerance, abs_tol=0.0)
        or (math.isnan(published[key]) and math.isnan(value))
        for key, value in metrics.items()
        if key.endswith("/loss") and key in published
    )


def _merge(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merges both lists in the order of their steps, with equal lines once."""
    seen: set[bytes] = set()
    merged = []
    for record in sorted([*first, *second], key=lambda r: r["step"]):
        raw = journal.encode(record)
        if raw not in seen:
            seen.add(raw)
            merged.append(record)
    return merged
