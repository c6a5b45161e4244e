"""A devcluster as the tests use it: submit, look and wait from the machine's own shell, as a person would."""

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
from pipeline.devcluster.settings import Settings, load, state_folder

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
    """Waits until the condition holds, looking `every` so many seconds; fails with `what()` if it does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"after {seconds:g} s: {what()}"
        time.sleep(every)


@dataclass
class Figures:
    """Seconds that tests measured, by what was measured; shown when they have ended."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        """Notes a measurement."""
        self.seconds[what] = round(seconds, 2)


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up.

    Attributes:
        settings: Of the cluster.
        work: A folder that all nodes see; job output goes here.
    """

    settings: Settings
    work: Path

    @property
    def env(self) -> dict[str, str]:
        """Variables of a shell that evaluated `pipeline devcluster env`."""
        return {**os.environ, **environment(self.settings), "PYTHONPATH": str(ROOT)}

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return self.settings.nodes

    def run(self, *command: str, check: bool = True) -> str:
        """Runs a command of the machine's own shell and returns what it printed."""
        done = subprocess.run(command, cwd=self.work, env=self.env, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, script: str, *options: str) -> str:
        """Submits shell lines; the output goes to JOB.out in the work folder. Returns the job id."""
        done = subprocess.run(
            [str(self.settings.bin / "sbatch"), "--parsable", "--output=%j.out", "--open-mode=append", *options],
            input=f"#!/bin/bash\n{script}\n", cwd=self.work, env=self.env, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, job: str) -> str:
        """What a job has printed so far."""
        path = self.work / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def show(self, job: str) -> dict[str, str]:
        """What slurmctld knows of a job: JobState, Restarts, NodeList, ExitCode, Reason ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait_for_state(self, job: str, states: set[str], seconds: float = 60) -> dict[str, str]:
        """Waits until a job is in one of these states, and returns what is known of it then."""
        wait_until(
            lambda: self.show(job)["JobState"] in states, seconds,
            lambda: f"job {job} is not {' or '.join(sorted(states))}: {self.show(job)}\n{self.output(job)}",
        )  # fmt: skip
        return self.show(job)

    def wait_for_output(self, job: str, text: str, seconds: float = 60) -> None:
        """Waits until a job has printed this."""
        wait_until(
            lambda: text in self.output(job), seconds,
            lambda: f"job {job} has not printed {text!r}: {self.show(job)}\n{self.output(job)}",
        )  # fmt: skip

    def nodes_of(self, job: str) -> list[str]:
        """The nodes a job runs on, the first one first."""
        return self.run("scontrol", "show", "hostnames", self.show(job)["NodeList"]).split()

    def cancel_all(self) -> None:
        """Cancels every job and waits until all have left their nodes."""
        self.run("scancel", "--user=root")
        wait_until(lambda: not self.run("squeue", "--noheader"), 60, lambda: self.run("squeue"))

    def kill_node(self, node: str) -> None:
        """Cuts a node's power."""
        devcluster.kill_node(self.settings, node)

    def slow_down(self, nodes: list[str], megabits: int) -> None:
        """Gives nodes a slow network, until they lose their power: what waits for it costs no computing time."""
        shape = f"tc qdisc add dev eth0 root tbf rate {megabits}mbit burst 64kb latency 400ms"
        for node in nodes:
            done = run_on(self.settings, node, shape.split())
            assert done.returncode == 0, done.stderr

    def start_node(self, node: str) -> None:
        """Brings a node back."""
        devcluster.start_node(self.settings, node)

    def restart_controller(self) -> None:
        """Ends slurmctld and starts it again."""
        devcluster.restart_controller(self.settings)

    @contextlib.contextmanager
    def without_controller(self) -> Iterator[None]:
        """Ends slurmctld, and starts it again afterwards."""
        services.stop_controller(self.settings)
        try:
            yield
        finally:
            services.start_controller(self.settings)
            services.wait_for_nodes(self.settings, self.nodes)


def open_cluster(state: Path, work: Path) -> Cluster:
    """The cluster in this folder, which must be up."""
    work.mkdir(parents=True, exist_ok=True)
    return Cluster(load(state_folder(state)), work)
