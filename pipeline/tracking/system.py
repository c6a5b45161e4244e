"""Samples the system metrics of a node into its own file in the run folder; each node's helper process runs it.

MLflow's monitors (psutil, NVML, ROCm) take the samples, so its page for system metrics finds the names it knows.
We send them ourselves: MLflow's sender blocks on a dead server and loses what it could not send.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from typing import Any

from pipeline.processes import large_imports
from pipeline.run import journal
from pipeline.run.folder import Run
from pipeline.tracking.energy import EnergyMeter
from pipeline.tracking.upload.store import quiet_environment

_log = logging.getLogger("pipeline.tracking")

_INTERVAL_S = 10.0
_FIRST_S = 10.0  # opening the monitors costs two CPU seconds, too much for a run of a few seconds


class NodeSampler:
    """Samples this node in a thread until `close`; `node` becomes part of every metric's name."""

    def __init__(self, run: Run, node: str, interval_s: float = _INTERVAL_S) -> None:
        self._node = re.sub(r"[^A-Za-z0-9_.-]", "_", node)
        self._file = run.system_metrics / f"{self._node}.jsonl"
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops the sampling and waits at most a second."""
        self._closing.set()
        self._thread.join(1.0)

    def _work(self) -> None:
        if self._closing.wait(min(_FIRST_S, self._interval_s)):
            return
        try:
            monitors = open_monitors()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            newest = journal.last_step(self._file)
            step = int(newest["step"]) + 1 if newest else 0
            prefix = f"system/{self._node}/"
            meter = EnergyMeter(newest or {}, prefix)
            with journal.Writer(self._file) as writer:
                while not self._closing.is_set():
                    sample = read_monitors(monitors)
                    sample |= meter.add(time.monotonic(), sample)
                    named = {prefix + name: value for name, value in sample.items()}
                    writer.write(journal.encode({"step": step, "time": round(time.time(), 3), **named}))
                    step += 1
                    self._closing.wait(self._interval_s)
        except OSError as error:
            _log.warning("the system metrics of %s stop here: %s", self._node, error)


def open_monitors() -> list[Any]:
    """Returns MLflow's monitors for this machine: CPU and memory, disk, network, and any GPUs."""
    quiet_environment()
    with large_imports():
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            monitors.append(kind())
        except Exception as error:  # without such a GPU each raises an error of its own kind
            _log.debug("no %s: %s", kind.__name__, error)
        else:
            break
    return monitors


def read_monitors(monitors: list[Any]) -> dict[str, float]:
    """Returns one sample of every monitor."""
    sample: dict[str, float] = {}
    for monitor in monitors:
        monitor.clear_metrics()
        monitor.collect_metrics()
        sample |= {k: float(v) for k, v in monitor.aggregate_metrics().items()}
    return sample


def node_name() -> str:
    """Returns the name of this node: Slurm's, or else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
