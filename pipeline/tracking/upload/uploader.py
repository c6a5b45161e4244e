"""Sends to MLflow in rounds while training runs; it runs in the helper process, never in the training."""

from __future__ import annotations

import logging
import os
import random
import threading
import time

from pipeline.config.sections import Config
from pipeline.run.folder import Run
from pipeline.tracking.upload.errors import in_words
from pipeline.tracking.upload.feed import Feed, lock_upload

_log = logging.getLogger("pipeline.tracking")

_ROUND_S = 5.0  # the greatest age of an unsent point; each round costs some milliseconds
_SHARE = 0.2  # of the time may be spent sending while it catches up: training comes first
_BUSY_S = 0.2
_PAUSE_S = (2.0, 30.0)  # between retries of a failing store: doubles from the first to the second


class Uploader:
    """Sends the journals to the store at a resolved address, round by round; one last round follows `closing`."""

    def __init__(self, run: Run, config: Config, uri: str, closing: threading.Event) -> None:
        self._uri = uri
        self._feed = Feed(run, config, uri)
        self._run = run
        self._closing = closing
        self._failing = False
        self._sent = 0

    def work(self) -> bool:
        """Sends until the last round has ended; returns whether the store has everything."""
        pause = _PAUSE_S[0]
        while True:
            # Read before the round: later lines get another round.
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
        """Returns whether the store has everything; None where `pipeline sync` or an earlier helper is sending."""
        try:
            fd = lock_upload(self._run)
            if fd is None:
                return None
            try:
                self._sent += self._feed.send_all(self._rest)
                if last_round:
                    self._feed.finish()
            finally:
                os.close(fd)
        except Exception as error:
            # No failure of a store or a lock may disturb training: everything is on disk.
            if not self._failing:
                self._failing, self._sent = True, 0
                _log.warning(
                    "MLflow at %s: %s. Training continues; metrics.jsonl keeps everything and is sent later "
                    "(automatically, or by `pipeline sync`).",
                    self._uri,
                    in_words(error),
                )
            return False
        if self._failing:
            self._failing = False
            _log.warning("MLflow at %s answers again; %d points sent", self._uri, self._sent)
        return True

    def _rest(self, took_s: float) -> bool:
        """Pauses between two batches of a backlog, so that training has the machine; never ends the round."""
        if not self._closing.is_set():
            self._closing.wait(min(took_s * (1 - _SHARE) / _SHARE, _PAUSE_S[1]))
        return False
