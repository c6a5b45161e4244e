"""System metrics of every node: the helper process of each samples it into a file of its own in the run folder.

The sampling is MLflow's own (psutil, NVML, ROCm), so that its page for system metrics finds the names it
knows; the sending is ours, because MLflow's blocks on a dead server and loses what it could not send.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from typing import Any

from pipeline.run import journal
from pipeline.run.folder import Run
from pipeline.tracking.upload.store import quiet_environment

_log = logging.getLogger("pipeline.tracking")

_INTERVAL_S = 10.0
_FIRST_S = 10.0  # a run of seconds does without; opening the monitors costs two seconds of a processor


class NodeSampler:
    """Samples this node in a thread until it is closed.

    Args:
        run: The run.
        node: Name of the node, part of every metric's name.
        interval_s: Seconds between samples.
    """

    def __init__(self, run: Run, node: str, interval_s: float = _INTERVAL_S) -> None:
        self._node = re.sub(r"[^A-Za-z0-9_.-]", "_", node)
        self._file = run.system_metrics / f"{self._node}.jsonl"
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the sampling; does not wait long."""
        self._closing.set()
        self._thread.join(1.0)

    def _work(self) -> None:
        if self._closing.wait(min(_FIRST_S, self._interval_s)):
            return
        try:
            monitors = open_monitors()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            newest = journal.last(self._file)
            step = int(newest["step"]) + 1 if newest else 0
            with journal.Writer(self._file) as writer:
                while not self._closing.is_set():
                    sample = {f"system/{self._node}/{k}": v for k, v in read_monitors(monitors).items()}
                    writer.write(journal.encode({"step": step, "time": round(time.time(), 3), **sample}))
                    step += 1
                    self._closing.wait(self._interval_s)
        except OSError as error:
            _log.warning("system metrics of %s end here: %s", self._node, error)


def open_monitors() -> list[Any]:
    """MLflow's monitors for this machine: CPU and memory, disk, network, and the GPUs that are there."""
    quiet_environment()
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(kind())
        except Exception as error:  # both raise what they please where there is no such GPU
            _log.debug("no %s: %s", kind.__name__, error)
        else:
            break
    return monitors


def read_monitors(monitors: list[Any]) -> dict[str, float]:
    """One sample of every monitor."""
    sample: dict[str, float] = {}
    for monitor in monitors:
        monitor.clear_metrics()
        monitor.collect_metrics()
        sample |= {k: float(v) for k, v in monitor.aggregate_metrics().items()}
    return sample


def node_name() -> str:
    """The name by which this node's metrics go: Slurm's, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
