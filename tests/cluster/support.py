"""A devcluster for tests: submits, inspects and waits from the shell of the machine, as a user would."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.devcluster import cluster as devcluster
from pipeline.devcluster import services
from pipeline.devcluster.hosts import environment, run_on
from pipeline.devcluster.settings import LOGIN, Settings, load, state_folder

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}


def pipeline(*args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line of this checkout."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *args], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert not check or done.returncode == 0, f"pipeline {' '.join(args)}: status {done.returncode}\n{done.stderr}"
    return done


def wait_until(condition: Callable[[], bool], seconds: float, what: Callable[[], str], every: float = 0.1) -> None:
    """Waits until the condition holds, testing it `every` so many seconds; fails with `what()` at the end."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds:g} s: {what()}"
        time.sleep(every)


@dataclass
class Figures:
    """Times that tests measured, in seconds by description; printed at the end of the session."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        """Adds a measurement."""
        self.seconds[what] = round(seconds, 2)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up."""

    settings: Settings
    work: Path
    """A folder that all nodes see; it receives the output of jobs."""

    @property
    def env(self) -> dict[str, str]:
        """Environment of a shell that evaluated `pipeline devcluster env`, of a user with settings of their own."""
        own = {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(self.work / "settings")}
        return {**os.environ, **environment(self.settings), **own}

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return self.settings.nodes

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a command on the machine and returns its output."""
        done = subprocess.run(command, cwd=self.work, env=self.env, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submits shell lines, with output to JOB.out in the work folder, and returns the job id."""
        done = subprocess.run(
            [str(self.settings.bin / "sbatch"), "--parsable", "--output=%j.out", "--open-mode=append", *options],
            input=f"#!/bin/bash\n{script}\n", cwd=self.work, env=self.env, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, job: str) -> str:
        """Returns what a job has printed so far."""
        path = self.work / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """Returns the fields of a job in slurmctld: JobState, Restarts, NodeList, ExitCode, Reason ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait_for_state(self, job: str, states: set[str], seconds: float = 60) -> dict[str, str]:
        """Waits until a job is in one of these states and returns its fields."""
        wait_until(
            lambda: self.show(job)["JobState"] in states, seconds,
            lambda: f"job {job} is not {' or '.join(sorted(states))}: {self.show(job)}\n{self.output(job)}",
        )  # fmt: skip
        return self.show(job)

    def wait_for_output(self, job: str, text: str, seconds: float = 60) -> None:
        """Waits until a job has printed this text."""
        wait_until(
            lambda: text in self.output(job), seconds,
            lambda: f"job {job} has not printed {text!r}: {self.show(job)}\n{self.output(job)}",
        )  # fmt: skip

    def nodes_of(self, job: str) -> list[str]:
        """Returns the nodes a job runs on, in order."""
        return self.run("scontrol", "show", "hostnames", self.show(job)["NodeList"]).split()

    def cancel_all(self) -> None:
        """Cancels every job and waits until the queue is empty."""
        self.run("scancel", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader"), 60, lambda: self.run("squeue"))

    def kill_node(self, node: str) -> None:
        """Cuts a node's power."""
        devcluster.kill_node(self.settings, node)

    def slow_down(self, nodes: list[str], megabits: int, device: str = "eth0") -> None:
        """Slows down the network of nodes until they lose their power; waiting for it takes no processor time."""
        # A packet of the loopback may have 64 kB, and one that is larger than the burst never gets through.
        shape = f"tc qdisc add dev {device} root tbf rate {megabits}mbit burst 128kb latency 800ms"
        for node in nodes:
            self._on(node, shape)

    @contextlib.contextmanager
    def cut_off(self, node: str) -> Iterator[None]:
        """Lets no packet of a node reach the controller during the block; what runs there runs on."""
        route = f"blackhole {self.settings.address(LOGIN)}/32"
        self._on(node, f"ip route add {route}")
        try:
            yield
        finally:
            self._on(node, f"ip route del {route}")
        back = f"{node} has not returned"
        wait_until(lambda: node in services.registrations(self.settings), 120, lambda: back, every=1.0)

    def _on(self, node: str, command: str) -> None:
        done = run_on(self.settings, node, command.split())
        assert done.returncode == 0, done.stderr

    def start_node(self, node: str) -> None:
        """Brings a node back up."""
        devcluster.start_node(self.settings, node)

    def restart_controller(self) -> None:
        """Restarts slurmctld."""
        devcluster.restart_controller(self.settings)

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Stops slurmctld for the block."""
        services.stop_controller(self.settings)
        try:
            yield
        finally:
            services.start_controller(self.settings)
            services.wait_for_nodes(self.settings, self.nodes)


def open_cluster(state: Path, work: Path) -> Cluster:
    """Returns the cluster in this folder, which must be up."""
    work.mkdir(parents=True, exist_ok=True)
    return Cluster(load(state_folder(state)), work)
