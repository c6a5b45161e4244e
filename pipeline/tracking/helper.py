"""One small process beside the training on each node: it samples the node and, beside the first rank, feeds MLflow.

A thread would do the same work under the interpreter's lock: importing mlflow alone holds the lock for more than
a second, making a store's tables for several, and every batch stops the training's Python for as long as it takes.
The process (`helper_process.py`) has a low priority, and it ends with the training, however that ends: its
standard input closes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pipeline
from pipeline.run.folder import Run
from pipeline.tracking.upload.store import quiet_environment

_log = logging.getLogger("pipeline.tracking")

_CLOSE = b"close\n"
# The scheduler signals every process of a job; the helper learns the end from its standard input instead.
_NOT_FOR_HELPERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
EVERYTHING_SENT = 0
POINTS_LEFT = 3


class Helper:
    """The training's side of it.

    Args:
        run: The run.
        uri: Resolved address of the store to feed; None to sample this node only.
        attempt: Which start of the run this is; while the process begins, the next start may.
    """

    def __init__(self, run: Run, uri: str | None, attempt: int) -> None:
        command = [sys.executable, "-m", "pipeline.tracking.helper_process", str(run.path), uri or "", str(attempt)]
        paths = [str(Path(pipeline.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        quiet_environment()
        self._process: subprocess.Popen[bytes] | None = None
        # A child keeps its parent's mask: from its first moment on these signals do not reach it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_HELPERS)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,  # a Ctrl-C is meant for the training
            )
        except OSError as error:
            _log.warning("no process for MLflow could be started (%s); `pipeline sync` does its work later", error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self, timeout_s: float) -> bool:
        """Tells it that nothing more will come; False where it did not get everything sent in time."""
        if self._process is None:
            return False
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_CLOSE)
            self._process.stdin.close()
        except OSError:  # it was killed
            return self._process.wait() == EVERYTHING_SENT
        try:
            return self._process.wait(timeout_s) == EVERYTHING_SENT
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
