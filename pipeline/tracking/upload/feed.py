"""Feeds one MLflow store from the files of a run folder; used by the uploader's thread and by `pipeline sync`.

Memory is bounded: never more than one batch of points is held, whatever has piled up on disk.
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

_log = logging.getLogger("pipeline.tracking")


class Feed:
    """The way from a run folder to one store.

    Args:
        run: The run.
        config: Its config.
        uri: Resolved address of the store.
    """

    def __init__(self, run: Run, config: Config, uri: str) -> None:
        self._run = run
        self._config = config
        self._uri = uri
        self._store: Store | None = None
        self._run_id: str | None = None
        self._described: Any = None
        self._refused: set[str] = set()

    def connect(self) -> tuple[Store, str]:
        """Opens the store and finds or makes the MLflow run.

        Its identity is written down before it is made, and its id before anything is sent.
        """
        if self._store is None:
            self._store = Store(self._uri, self._config.tracking.experiment, self._config.tracking.artifact_location)
        if self._run_id is None:
            s = upload_state.update(
                self._run, lambda s: None
            )  # an identity that is not on disk would be another next time
            known = s.of(self._uri).run_id
            run_id = self._store.ensure_run(s.identity, known, self._run.name, self._began_ms())
            if run_id != known:
                # A run that is new to this store has nothing yet, whatever was sent to an earlier one.
                upload_state.update(
                    self._run, lambda s: s.stores.update({self._uri: upload_state.StoreState(run_id=run_id)})
                )
            self._run_id = run_id
        return self._store, self._run_id

    def disconnect(self) -> None:
        """Forgets what was known about the store, so that the next round asks it again."""
        self._run_id = None
        self._described = None

    def send_all(self, pause: Callable[[float], bool] = lambda _: False) -> int:
        """Sends what the store has not got; returns the number of points.

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
        """Sends the files and the status as they stand now; everything else must have been sent."""
        store, run_id = self.connect()
        self._describe(store, run_id)
        self._send_status(store, run_id)

    # ---- metrics -----------------------------------------------------------------------------

    def _send_metrics(self, store: Store, run_id: str, pause: Callable[[float], bool]) -> int:
        """Sends what is there now: what comes while it sends would make ever smaller batches, and no end of them."""
        sent, until = 0, journal.size(self._run.metrics_file)
        while True:
            claim = upload_state.settled(self._run)
            batch, end = _batch(self._run.metrics_file, claim.of(self._uri).sent, claim.retry_number)
            if not batch:
                return sent
            # What the store has must not be lost with this node: the next start could not know of it.
            journal.make_durable(self._run.metrics_file)
            # Written down before anything leaves: from here on these lines may be in the store, and a
            # rewind that comes in between will keep them.
            if not self._move(claim.generation, sending=end):
                continue
            began = time.monotonic()
            self._send(store, run_id, batch)
            self._move(claim.generation, sent=end)
            sent += len(batch)
            if end >= until or pause(time.monotonic() - began):
                return sent

    def _move(self, generation: int, *, sending: int | None = None, sent: int | None = None) -> bool:
        """Moves the position, unless metrics.jsonl was cut meanwhile."""
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
            if offset > journal.size(file):  # it was lost or began anew; what is sent twice is stored once
                offset = 0
            while True:
                batch, offset = _batch(file, offset, lambda _: 0)
                if not batch:
                    break
                # As with metrics.jsonl: lines that the store has must not be lost, or others took their place.
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
        """Sends params, tags, the dataset and files that are new or changed; each is sent once as it is."""
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
                # A refusal would be the same for ever and must not keep the metrics from being sent.
                _log.warning("MLflow refuses a part of the description: %s", in_words(error))
        if (
            upload_state.load(self._run).of(self._uri).status is None
            or upload_state.load(self._run).status == "RUNNING"
        ):
            self._send_status(store, run_id)
        self._described = newest

    def _fingerprint(self) -> Any:
        stats = []
        for file, folder in describe.files(self._run):
            found = file.stat()
            stats.append((folder, file.name, found.st_size, found.st_mtime_ns))
        return stats

    def _send_params(self, store: Store, run_id: str) -> None:
        now = describe.params(self._config)
        changed = {f"changed.{name}" for name in store.set_params(run_id, now)}
        # A param that was changed back equals its first value again: its tag must say so too.
        told = store.read_run(run_id).data.tags.keys()
        tags = {f"changed.{name}": value for name, value in now.items()}
        store.set_tags(run_id, {tag: value for tag, value in tags.items() if tag in changed or tag in told})

    def _send_tags(self, store: Store, run_id: str) -> None:
        tags = describe.tags(self._run)
        s = upload_state.load(self._run)
        if s.retries:
            tags["pipeline.retries"] = json.dumps([r.model_dump() for r in s.retries])
        split = goodput(self._run, EventLog.load(self._run.events_file))
        if split is not None:
            tags["pipeline.goodput"] = split.summary()
        store.set_tags(run_id, tags)

    def _send_dataset(self, store: Store, run_id: str) -> None:
        about = describe.dataset(self._run, self._config, upload_state.load(self._run).dataset)
        if about is not None:
            store.set_dataset(run_id, *about)

    def _send_evaluation(self, store: Store, run_id: str) -> None:
        found = describe.evaluation(self._run)
        if found is not None:
            self._send(store, run_id, list(_points(found, 0)))

    def _send_files(self, store: Store, run_id: str) -> None:
        made = describe.checkpoints(self._run)
        listing = self._run.checkpoint_list
        if made and (not listing.exists() or read_json(listing) != made):
            write_json(listing, made)
        there = upload_state.load(self._run).of(self._uri).files
        for file, folder in describe.files(self._run):
            name = f"{folder}/{file.name}" if folder else file.name
            digest = sha256_file(file)
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
            split = goodput(self._run, EventLog.load(self._run.events_file))
            if split is not None:
                at = int((s.ended or time.time()) * 1000)
                last = journal.last(self._run.metrics_file) or {"step": 0}
                self._send(store, run_id, [Point(k, v, at, int(last["step"])) for k, v in split.metrics().items()])
        store.set_status(run_id, wanted, None if s.ended is None else int(s.ended * 1000))
        upload_state.update(self._run, lambda s: setattr(s.of(self._uri), "status", key))

    def _began_ms(self) -> int:
        events = EventLog.load(self._run.events_file)
        return int((events[0].time if events else time.time()) * 1000)


def _batch(file: Path, offset: int, retry_of: Callable[[int], int]) -> tuple[list[Point], int]:
    """The points of whole lines from an offset on, as many as one request may hold; and where they end."""
    points: list[Point] = []
    end = offset
    for line in journal.read(file, offset):
        of_line = list(_points(line.record, retry_of(int(line.record["step"]))))
        if points and len(points) + len(of_line) > MAX_POINTS:
            break
        points += of_line
        end = line.end
    return points, end


def _points(record: dict[str, Any], retry: int) -> Iterator[Point]:
    """The points of a line; a file of metrics has steps and times of its own."""
    suffix = f".retry{retry}" if retry else ""
    time_ms, step = round(float(record["time"]) * 1000), int(record["step"])
    for key, value in record.items():
        if key not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield Point(key + suffix, float(value), time_ms, step)


class UploadLock:
    """Keeps two processes from feeding one run at the same time; held for a round, not for a life."""

    def __init__(self, run: Run) -> None:
        run.tracking.mkdir(parents=True, exist_ok=True)
        self._path = run.upload_lock

    def acquire(self) -> int | None:
        """An open file that holds the lock (close it to let go), or None where another process has it."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        if upload_state.lock(fd, wait=False):
            return fd
        os.close(fd)
        return None
