"""One small process beside the training on each node: it samples the node and, beside the first rank, feeds MLflow.

A thread would do the same work under the interpreter's lock: importing mlflow alone holds the lock for more than
a second, making a store's tables for several, and every batch stops the training's Python for as long as it takes.
The process has a low priority, and it ends with the training, however that ends: its standard input closes.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pipeline
from pipeline.run import Run
from pipeline.tracking.store import quiet_environment

_log = logging.getLogger("pipeline.tracking")

_CLOSE = b"close\n"
_NICE = 10
_LAST_ROUND_S = 20.0  # for the rest of the points of a training that was killed
_ENDED_WITH_EVERYTHING_SENT = 0
_ENDED_WITH_POINTS_LEFT = 3


class Helper:
    """The training's side of it.

    Args:
        run: The run.
        uri: Resolved address of the store to feed; None to sample this node only.
    """

    def __init__(self, run: Run, uri: str | None) -> None:
        command = [sys.executable, "-m", "pipeline.tracking.helper", str(run.path), uri or ""]
        paths = [str(Path(pipeline.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        quiet_environment()
        self._process: subprocess.Popen[bytes] | None = None
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

    def close(self, timeout_s: float) -> bool:
        """Tells it that nothing more will come; False where it did not get everything sent in time."""
        if self._process is None:
            return False
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(_CLOSE)
            self._process.stdin.close()
        except OSError:  # it was killed
            return self._process.wait() == _ENDED_WITH_EVERYTHING_SENT
        try:
            return self._process.wait(timeout_s) == _ENDED_WITH_EVERYTHING_SENT
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False


def main(folder: str, uri: str) -> int:
    """The process itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the scheduler signals every process of a job; stdin tells us the end
    os.nice(_NICE)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # mlflow is imported by these; only now, so that the signals above are ignored from the beginning.
    from pipeline.tracking import state
    from pipeline.tracking.sync import note_killed
    from pipeline.tracking.system import NodeSampler, node_name
    from pipeline.tracking.uploader import Uploader

    run = Run(Path(folder))
    attempt = state.load(run).attempt
    closing = threading.Event()
    told: list[bytes] = []

    def listen() -> None:
        told.append(sys.stdin.buffer.read())  # returns when the training says so or is gone
        if not told[0]:
            note_killed(run, attempt)
            threading.Timer(_LAST_ROUND_S, os._exit, [_ENDED_WITH_POINTS_LEFT]).start()
        sampler.close()
        closing.set()

    sampler = NodeSampler(run, node_name())
    threading.Thread(target=listen, name="end-of-training", daemon=True).start()
    if not uri:
        closing.wait()
        return _ENDED_WITH_EVERYTHING_SENT
    sent = Uploader(run, run.config(), uri, closing).work()
    return _ENDED_WITH_EVERYTHING_SENT if sent else _ENDED_WITH_POINTS_LEFT


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    # Without the interpreter's own end, which would wait for a timer or a request that nobody needs any more.
    os._exit(status)
