"""The thread that feeds MLflow while training runs; it may wait for a store as long as it likes."""

from __future__ import annotations

import logging
import os
import random
import threading
import time

from pipeline.config import Config
from pipeline.run import Run
from pipeline.tracking.feed import Feed, UploadLock
from pipeline.tracking.store import redact

_log = logging.getLogger("pipeline.tracking")

_ROUND_S = 2.0  # how old a point gets before it is sent
_FIRST_ROUND_S = 20.0  # importing mlflow takes more than a second of the interpreter: after the first steps, or this
_SHARE = 0.2  # of the thread's time that may go into sending while it catches up
_BUSY_S = 0.2
_PAUSE_S = (2.0, 30.0)  # between tries of a store that fails: doubling from the first to the second


class Uploader:
    """Sends what the journals hold until it is closed.

    Args:
        run: The run.
        config: Its config.
        uri: Resolved address of the store.
    """

    def __init__(self, run: Run, config: Config, uri: str) -> None:
        self._uri = uri
        self._feed = Feed(run, config, uri)
        self._lock = UploadLock(run)
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._failing = False
        self._sent = 0
        # A daemon: a store that does not answer must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="mlflow-uploader", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There is something new; costs nothing."""
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Lets the thread send the rest and the status; False where that did not succeed in time."""
        self._closing.set()
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self._failing

    def _work(self) -> None:
        self._wake.wait(_FIRST_ROUND_S)
        pause = _PAUSE_S[0]
        while True:
            # Read before the round: what is written after this moment gets a round of its own.
            last_round = self._closing.is_set()
            self._wake.clear()
            fd = self._lock.acquire()
            if fd is None:  # `pipeline sync` is sending, or the process before this one still is
                time.sleep(_BUSY_S)
                self._wake.set()
                continue
            try:
                done = self._round(last_round)
            finally:
                os.close(fd)
            if last_round:
                return
            if done:
                pause = _PAUSE_S[0]
                self._sleep(_ROUND_S)
                self._wake.wait()
            else:
                self._sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, _PAUSE_S[1])

    def _sleep(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def _round(self, last_round: bool) -> bool:
        try:
            self._sent += self._feed.send_all(self._rest)
            if last_round:
                self._feed.finish()
        except Exception as error:
            # Whatever goes wrong with a store is no reason to disturb training: everything is on disk.
            if not self._failing:
                self._failing, self._sent = True, 0
                _log.warning(
                    "MLflow at %s: %s. Training goes on; metrics.jsonl keeps everything and is sent later "
                    "(by itself, or by `pipeline sync`).",
                    self._uri,
                    _first_line(error),
                )
            return False
        if self._failing:
            self._failing = False
            _log.warning("MLflow at %s answers again; %d points sent", self._uri, self._sent)
        return True

    def _rest(self, took_s: float) -> bool:
        """Leaves the interpreter to training between two batches of a backlog."""
        if not self._closing.is_set():
            began = time.monotonic()
            self._closing.wait(min(took_s * (1 - _SHARE) / _SHARE, _PAUSE_S[1]))
            return time.monotonic() - began > _PAUSE_S[1]
        return False


def _first_line(error: Exception) -> str:
    text = redact(str(error)).strip() or type(error).__name__
    return text.splitlines()[0][:300]
