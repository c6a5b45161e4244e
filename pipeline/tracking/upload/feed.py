"""Feeds one MLflow store from the files of a run folder, for the uploader and for `pipeline sync`.

Memory is bounded: it holds at most one batch of points, whatever the backlog on disk.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.config.sections import Config
from pipeline.files import read_json, sha256_file, write_json
from pipeline.run import journal
from pipeline.run.events import EventLog
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.goodput import goodput
from pipeline.tracking.upload import describe
from pipeline.tracking.upload.errors import in_words, is_missing, is_refusal
from pipeline.tracking.upload.store import MAX_POINTS, Point, Store
from pipeline.tracking.usage import usage

_log = logging.getLogger("pipeline.tracking")


class Feed:
    """Sends one run folder to one store, named by its resolved address."""

    def __init__(self, run: Run, config: Config, uri: str) -> None:
        self._run = run
        self._config = config
        self._uri = uri
        self._store: Store | None = None
        self._run_id: str | None = None
        self._described: Any = None
        self._refused: set[str] = set()

    def connect(self) -> tuple[Store, str]:
        """Opens the store and finds or creates the MLflow run; returns the store and the id of the run.

        Records its identity before creating it, and its id before sending anything.
        """
        if self._store is None:
            self._store = Store(self._uri, self._config.tracking.experiment, self._config.tracking.artifact_location)
        if self._run_id is None:
            # `update`, as an identity that is not on disk would differ the next time.
            s = upload_state.update(self._run, lambda s: None)
            known = s.of(self._uri).run_id
            run_id = self._store.ensure_run(s.identity, known, self._run.name, self._began_ms())
            if run_id != known:
                # A run new to this store has nothing yet, whatever an earlier one received.
                upload_state.update(
                    self._run, lambda s: s.stores.update({self._uri: upload_state.StoreState(run_id=run_id)})
                )
            self._run_id = run_id
        return self._store, self._run_id

    def disconnect(self) -> None:
        """Forgets what is known about the store, so that the next round asks it again."""
        self._run_id = None
        self._described = None

    def send_all(self, pause: Callable[[float], bool] = lambda _: False) -> int:
        """Sends what the store lacks; returns the number of points.

        Args:
            pause: Called with the seconds each batch took; True ends the round early.
        """
        sent = 0
        try:
            store, run_id = self.connect()
            self._describe(store, run_id)
            sent += self._send_metrics(store, run_id, pause)
            sent += self._send_system(store, run_id, pause)
        except Exception as error:
            if is_missing(error):
                self.disconnect()
            raise
        return sent

    def finish(self) -> None:
        """Sends the current files and status; the caller has sent everything else."""
        store, run_id = self.connect()
        self._describe(store, run_id)
        self._send_status(store, run_id)

    # ---- metrics -----------------------------------------------------------------------------

    def _send_metrics(self, store: Store, run_id: str, pause: Callable[[float], bool]) -> int:
        """Sends the lines present at its start: later ones would cause ever smaller batches without end."""
        sent, until = 0, journal.size(self._run.metrics_file)
        while True:
            claim = upload_state.settled(self._run)
            batch, end = _batch(self._run.metrics_file, claim.of(self._uri).sent, claim.retry_number)
            if not batch:
                return sent
            # This node must not lose what the store has: the next start could not know of it.
            journal.make_durable(self._run.metrics_file)
            # Recorded before sending: from here on the store may have these lines, and a rewind will keep them.
            if not self._move(claim.generation, sending=end):
                continue
            began = time.monotonic()
            self._send(store, run_id, batch)
            self._move(claim.generation, sent=end)
            sent += len(batch)
            if end >= until or pause(time.monotonic() - began):
                return sent

    def _move(self, generation: int, *, sending: int | None = None, sent: int | None = None) -> bool:
        """Moves the position, unless metrics.jsonl was cut meanwhile; returns whether it moved."""
        moved = False

        def change(s: upload_state.State) -> None:
            nonlocal moved
            moved = s.generation == generation
            if moved and sending is not None:
                s.of(self._uri).sending = max(s.of(self._uri).sending, sending)
            if moved and sent is not None:
                s.of(self._uri).sent = max(s.of(self._uri).sent, sent)

        upload_state.update(self._run, change)
        return moved

    def _send_system(self, store: Store, run_id: str, pause: Callable[[float], bool]) -> int:
        sent = 0
        for file in sorted(self._run.system_metrics.glob("*.jsonl")):
            offset = upload_state.load(self._run).of(self._uri).system.get(file.stem, 0)
            if offset > journal.size(file):  # the file was lost and restarted; MLflow stores once what it gets twice
                offset = 0
            while True:
                batch, offset = _batch(file, offset, lambda _: 0)
                if not batch:
                    break
                # As with metrics.jsonl: were lines lost that the store has, new ones would take their place.
                journal.make_durable(file)
                began = time.monotonic()
                self._send(store, run_id, batch)
                upload_state.update(self._run, lambda s, n=file.stem, o=offset: s.of(self._uri).system.update({n: o}))  # type: ignore[misc]
                sent += len(batch)
                if pause(time.monotonic() - began):
                    return sent
        return sent

    def _send(self, store: Store, run_id: str, points: list[Point]) -> None:
        for first in range(0, len(points), MAX_POINTS):
            for key in store.send_points(run_id, points[first : first + MAX_POINTS]):
                if key not in self._refused:
                    self._refused.add(key)
                    _log.warning("MLflow refuses the metric %r; it stays in metrics.jsonl only", key)

    # ---- everything else ---------------------------------------------------------------------

    def _describe(self, store: Store, run_id: str) -> None:
        """Sends params, tags, the dataset and files if a file is new or changed."""
        newest = self._fingerprint()
        if newest == self._described:
            return
        parts = (self._send_params, self._send_tags, self._send_dataset, self._send_evaluation, self._send_files)
        for part in parts:
            try:
                part(store, run_id)
            except Exception as error:
                if not is_refusal(error):
                    raise
                # A refusal is permanent and must not hold the metrics back.
                _log.warning("MLflow refuses a part of the description: %s", in_words(error))
        s = upload_state.load(self._run)
        if s.of(self._uri).status is None or s.status == "RUNNING":
            self._send_status(store, run_id)
        self._described = newest

    def _fingerprint(self) -> Any:
        found = [(folder, file.name, file.stat()) for file, folder in describe.files(self._run)]
        return [(folder, name, stat.st_size, stat.st_mtime_ns) for folder, name, stat in found]

    def _send_params(self, store: Store, run_id: str) -> None:
        now = describe.params(self._config)
        changed = {f"changed.{name}" for name in store.set_params(run_id, now)}
        # A param may change back to its first value: its tag must then say so too.
        told = store.read_run(run_id).data.tags.keys()
        tags = {f"changed.{name}": value for name, value in now.items()}
        store.set_tags(run_id, {tag: value for tag, value in tags.items() if tag in changed or tag in told})

    def _send_tags(self, store: Store, run_id: str) -> None:
        tags = describe.tags(self._run)
        s = upload_state.load(self._run)
        if s.copied_from is not None:
            tags["pipeline.copied_from"] = s.copied_from
        if s.retries:
            tags["pipeline.retries"] = json.dumps([r.model_dump() for r in s.retries])
        events = EventLog.load(self._run.events_file)
        found = {
            "goodput": goodput(self._run, events),
            "usage": usage(self._run, events, now=s.ended or time.time()),
        }
        tags |= {f"pipeline.{name}": account.summary() for name, account in found.items() if account is not None}
        store.set_tags(run_id, tags)

    def _send_dataset(self, store: Store, run_id: str) -> None:
        about = describe.dataset(self._config, upload_state.load(self._run).dataset)
        if about is not None:
            store.set_dataset(run_id, *about)

    def _send_evaluation(self, store: Store, run_id: str) -> None:
        found = describe.evaluation(self._run)
        for line in (*([] if found is None else [found]), *describe.task_evaluations(self._run)):
            self._send(store, run_id, list(_points(line, 0)))

    def _send_files(self, store: Store, run_id: str) -> None:
        made = describe.checkpoints(self._run)
        listing = self._run.checkpoint_list
        if made and (not listing.exists() or read_json(listing) != made):
            write_json(listing, made)
        there = upload_state.load(self._run).of(self._uri).files
        for file, folder in describe.files(self._run):
            name = f"{folder}/{file.name}" if folder else file.name
            digest = sha256_file(file, self._run.path)
            if there.get(name) != digest:
                store.send_file(run_id, file, folder)
                upload_state.update(self._run, lambda s, n=name, d=digest: s.of(self._uri).files.update({n: d}))  # type: ignore[misc]

    def _send_status(self, store: Store, run_id: str) -> None:
        s = upload_state.load(self._run)
        wanted = describe.status(self._run, s)
        key = wanted if wanted == "RUNNING" else f"{wanted} {s.ended}"
        if s.of(self._uri).status == key:
            return
        if wanted != "RUNNING":
            events, ended = EventLog.load(self._run.events_file), s.ended or time.time()
            step = int((journal.last_step(self._run.metrics_file) or {"step": 0})["step"])
            for account in (goodput(self._run, events), usage(self._run, events, now=ended)):
                values = account.metrics() if account is not None else {}
                self._send(store, run_id, [Point(k, v, int(ended * 1000), step) for k, v in values.items()])
        store.set_status(run_id, wanted, None if s.ended is None else int(s.ended * 1000))
        upload_state.update(self._run, lambda s: setattr(s.of(self._uri), "status", key))

    def _began_ms(self) -> int:
        events = EventLog.load(self._run.events_file)
        return int((events[0].time if events else time.time()) * 1000)


def _batch(file: Path, offset: int, retry_of: Callable[[int], int]) -> tuple[list[Point], int]:
    """Returns the points of complete lines from an offset, at most one request full, and where they end."""
    points: list[Point] = []
    end = offset
    for line in journal.read_steps(file, offset):
        of_line = list(_points(line.record, retry_of(int(line.record["step"]))))
        if points and len(points) + len(of_line) > MAX_POINTS:
            break
        points += of_line
        end = line.end
    return points, end


def _points(record: dict[str, Any], retry: int) -> Iterator[Point]:
    """Yields the points of one line, with its step and time."""
    suffix = f".retry{retry}" if retry else ""
    time_ms, step = round(float(record["time"]) * 1000), int(record["step"])
    for key, value in record.items():
        if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield Point(key + suffix, float(value), time_ms, step)


def lock_upload(run: Run) -> int | None:
    """Keeps other processes from feeding the run until the file that it returns is closed; None where one does."""
    run.tracking.mkdir(parents=True, exist_ok=True)
    fd = os.open(run.upload_lock, os.O_RDWR | os.O_CREAT, 0o644)
    if upload_state.lock(fd, wait=False):
        return fd
    os.close(fd)
    return None
