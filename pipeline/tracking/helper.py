"""Starts one helper process per node, which samples the node and, beside rank 0, feeds MLflow.

A thread would hold the interpreter's lock: more than a second to import mlflow, several to make the tables of a
store, and the training's Python would stop for each batch. The process (`helper_process.py`) has a low priority and
ends however the training ends: its standard input closes.
"""

from __future__ import annotations

import contextlib
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
# The scheduler signals every process of a job; the helper learns of the end from its standard input.
_NOT_FOR_HELPERS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}
_NICE = 10
EVERYTHING_SENT = 0
POINTS_LEFT = 3


class Helper:
    """The training's handle on its helper process.

    Args:
        run: The run.
        uri: Resolved address of the store to feed; None to sample this node only.
        attempt: Number of this start of the run; the next one may begin before the process does.
    """

    def __init__(self, run: Run, uri: str | None, attempt: int) -> None:
        command = [sys.executable, "-m", "pipeline.tracking.helper_process", str(run.path), uri or "", str(attempt)]
        paths = [str(Path(pipeline.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        quiet_environment()
        self._process: subprocess.Popen[bytes] | None = None
        # A child inherits the mask, so these signals never reach it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_HELPERS)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,  # Ctrl-C is meant for the training
            )
            _step_back(self._process.pid)
        except OSError as error:
            _log.warning("cannot start the helper process for MLflow (%s); run `pipeline sync` later", error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self, timeout_s: float) -> bool:
        """Asks the process to finish; returns whether it sent everything within `timeout_s`."""
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


def _step_back(process: int) -> None:
    """Gives the training priority on the processor; now, because the helper imports for longer than a first step takes.

    The helper may have died.
    """
    with contextlib.suppress(ProcessLookupError):
        behind = min(os.getpriority(os.PRIO_PROCESS, 0) + _NICE, 19)
        os.setpriority(os.PRIO_PROCESS, process, behind)
    # Where the kernel shares time between sessions, niceness counts only within one, and the helper has its own.
    with contextlib.suppress(FileNotFoundError, PermissionError):  # other kernels; a container's read-only /proc
        Path(f"/proc/{process}/autogroup").write_text(str(_NICE))
