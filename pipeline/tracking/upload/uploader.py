"""Rounds of sending to MLflow while training runs; runs in the helper process, never in the training."""

from __future__ import annotations

import logging
import os
import random
import threading
import time

from pipeline.config.sections import Config
from pipeline.run.folder import Run
from pipeline.tracking.upload.errors import in_words
from pipeline.tracking.upload.feed import Feed, UploadLock

_log = logging.getLogger("pipeline.tracking")

_ROUND_S = 5.0  # how old a point gets before it is sent; every round costs the machine some milliseconds
_SHARE = 0.2  # of the time that may go into sending while it catches up: the machine is there for training
_BUSY_S = 0.2
_PAUSE_S = (2.0, 30.0)  # between tries of a store that fails: doubling from the first to the second


class Uploader:
    """Sends what the journals hold, round by round, until it is told that nothing more will come.

    Args:
        run: The run.
        config: Its config.
        uri: Resolved address of the store.
        closing: Set when the training has ended; one last round follows.
    """

    def __init__(self, run: Run, config: Config, uri: str, closing: threading.Event) -> None:
        self._uri = uri
        self._feed = Feed(run, config, uri)
        self._lock = UploadLock(run)
        self._closing = closing
        self._failing = False
        self._sent = 0

    def work(self) -> bool:
        """Returns whether the store has everything, after the last round."""
        pause = _PAUSE_S[0]
        while True:
            # Read before the round: what is written after this moment gets a round of its own.
            last_round = self._closing.is_set()
            done = self._round(last_round)
            if done is None:
                time.sleep(_BUSY_S)
                continue
            if last_round:
                return done
            if done:
                pause = _PAUSE_S[0]
                self._closing.wait(_ROUND_S)
            else:
                self._closing.wait(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, _PAUSE_S[1])

    def _round(self, last_round: bool) -> bool | None:
        """Whether the store has everything now; None where `pipeline sync` or the process before is sending."""
        try:
            fd = self._lock.acquire()
            if fd is None:
                return None
            try:
                self._sent += self._feed.send_all(self._rest)
                if last_round:
                    self._feed.finish()
            finally:
                os.close(fd)
        except Exception as error:
            # Whatever goes wrong with a store, or a lock, is no reason to disturb training: everything is on disk.
            if not self._failing:
                self._failing, self._sent = True, 0
                _log.warning(
                    "MLflow at %s: %s. Training goes on; metrics.jsonl keeps everything and is sent later "
                    "(by itself, or by `pipeline sync`).",
                    self._uri,
                    in_words(error),
                )
            return False
        if self._failing:
            self._failing = False
            _log.warning("MLflow at %s answers again; %d points sent", self._uri, self._sent)
        return True

    def _rest(self, took_s: float) -> bool:
        """Leaves the machine to training between two batches of a backlog; True ends the round."""
        if not self._closing.is_set():
            self._closing.wait(min(took_s * (1 - _SHARE) / _SHARE, _PAUSE_S[1]))
        return False
