"""A small training run on a devcluster, submitted by the command line."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.layout import Manifest
from pipeline.launch.slurm import job_records
from pipeline.run.attempts import Stage
from pipeline.run.folder import Run, step_name
from tests import experiment
from tests.cluster.support import ENDED, ROOT, Cluster, pipeline, wait_until

STEPS = 400
CHECKPOINT_INTERVAL = 50
# Far enough from the first step and from the last.
MIDDLE = 130

_OVERRIDES = (
    f"train.max_iters={STEPS}",
    f"train.checkpoint_interval={CHECKPOINT_INTERVAL}",
    "train.val_interval=100",
    f"optimizer.cosine_cycle_iters={STEPS}",
)


@dataclass(frozen=True)
class Training:
    """A run that was submitted."""

    cluster: Cluster
    run: Path
    """The run folder."""
    config: Path
    """The config file."""
    site: Path
    """The site file."""
    overrides: tuple[str, ...]
    """Dotted overrides of the config."""
    checkout: Path = ROOT
    """The checkout whose code is submitted."""

    def submit(self) -> str:
        """Submits all stages that are not done; returns the output."""
        done = self.try_to_submit()
        assert done.returncode == 0, done.stderr
        return done.stdout

    def try_to_submit(self) -> subprocess.CompletedProcess[str]:
        """Submits like `submit`, but returns a refusal instead of failing."""
        submission = ("submit", str(self.config), "--site", str(self.site), *self.overrides)
        return self.pipeline(*submission, checkout=self.checkout)

    def pipeline(self, *args: str, checkout: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """Runs the command line of a checkout, by default this one, with the environment of the cluster."""
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *args],
            cwd=checkout, env={**self.cluster.env, "PYTHONPATH": str(checkout)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def train_here(self, *options: str) -> subprocess.Popen[bytes]:
        """Starts `pipeline train` on two ranks of this machine, as a user does by hand; its output is in the run."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "pipeline"]
        command = [*launcher, "train", str(self.config), *self.overrides, *options]
        with (self.run / "logs" / "by_hand.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.checkout, env=self.cluster.env, stdout=log, stderr=log)

    def ended(self, job: str) -> list[dict[str, Any]]:
        """Returns what the attempts of a job noted at their end, oldest first."""
        notes = experiment.lines(self.run / "launch" / "attempts.jsonl")
        return [note for note in notes if note["event"] == "ended" and note["job"] == job]

    def job(self, stage: Stage) -> str:
        """Returns the id of the newest job of a stage."""
        return [job.id for job in job_records.jobs(Run(self.run)) if job.stage == stage][-1]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Returns the events of one kind."""
        return experiment.events(self.run, kind)

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        """Waits until training has logged this step."""
        wait_until(lambda: experiment.last_step(self.run) >= step, seconds, lambda: f"no step {step}\n{self.words()}")

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until the condition holds; fails with the logs of the jobs."""
        wait_until(condition, seconds, lambda: f"{what}\n{self.words()}")

    def wait_for_end(self, stage: Stage, seconds: float = 300) -> dict[str, str]:
        """Waits until the job of a stage has ended for good; returns its fields in Slurm."""
        job = self.job(stage)

        def ended() -> bool:
            return self.cluster.show(job)["JobState"] in ENDED

        # Each query of Slurm takes processor time, which the job needs.
        wait_until(ended, seconds, lambda: f"the job of {stage} has not ended\n{self.words()}", every=0.5)
        return self.cluster.show(job)

    def new_step_after(self, moment: float) -> float:
        """Returns the Unix time of the first step of the start that resumed after `moment`."""
        begun = min(e["time"] for e in self.events("resumed") if e["time"] > moment)
        return min(m["time"] for m in experiment.lines(self.run / "metrics.jsonl") if m["time"] > begun)

    def words(self) -> str:
        """Returns the ends of all logs, for the message of a failing test."""
        files = sorted(
            [*self.run.glob("launch/*.err"), *self.run.glob("logs/**/*.log"), *self.run.glob("*events.jsonl")]
        )
        parts = [f"--- {path.relative_to(self.run)}\n{path.read_text(errors='replace')[-1500:]}" for path in files]
        return "\n".join([self.cluster.run("squeue", check=False), *parts])


def start(cluster: Cluster, name: str, *overrides: str, checkout: Path = ROOT, **site: Any) -> Training:
    """Submits a run of the small experiment; takes the arguments of `describe`."""
    training = describe(cluster, name, *overrides, checkout=checkout, **site)
    training.submit()
    return training


def describe(cluster: Cluster, name: str, *overrides: str, checkout: Path = ROOT, **site: Any) -> Training:
    """Writes the files of a run of the small experiment without submitting it.

    Args:
        cluster: The cluster.
        name: Name of the run.
        overrides: Dotted overrides, added to those of the experiment.
        checkout: The checkout whose code is submitted.
        site: Values that replace those of the site file; a mapping is merged.
    """
    config = experiment.write_experiment(cluster.work, cluster.work / "runs", name)
    site_file = _site_file(cluster, name, site)
    return Training(cluster, cluster.work / "runs" / name, config, site_file, (*_OVERRIDES, *overrides), checkout)


def prepare(cluster: Cluster) -> None:
    """Prepares the data of all runs in this working folder, without a job."""
    config = experiment.write_experiment(cluster.work, cluster.work / "runs", "prepared")
    pipeline("prepare", str(config))


def assert_same_training(run: Path, reference: Path) -> None:
    """Asserts that every step was logged once with the loss of the reference and the last weights are identical."""
    assert experiment.curve(run) == experiment.curve(reference)
    assert experiment.validations(run) == experiment.validations(reference)
    last = [Manifest.load(r / "checkpoints" / step_name(STEPS)).files for r in (run, reference)]
    assert last[0] == last[1]


def assert_same_beginning(run: Path, reference: Path) -> None:
    """Asserts that every logged loss is that of the reference."""
    found = experiment.curve(run)
    assert found == experiment.curve(reference)[: len(found)]


def processes_of(cluster: Cluster, node: str, words: str) -> list[int]:
    """Returns the processes on a node whose command line contains these words, by their ids on the machine."""
    from pipeline.devcluster.hosts import pid_of

    host = pid_of(cluster.settings, node)
    assert host is not None
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            same = (process / "ns" / "pid").readlink() == Path(f"/proc/{host}/ns/pid").readlink()
        except OSError:  # it has ended
            continue
        if same and words in line:
            found.append(int(process.name))
    return found


def now() -> float:
    """Returns the time on the clock that events use."""
    return time.time()


def _site_file(cluster: Cluster, name: str, changes: dict[str, Any]) -> Path:
    site = yaml.safe_load((ROOT / "slurm" / "sites" / "devcluster.yaml").read_text())
    for key, value in changes.items():
        site[key] = {**site.get(key, {}), **value} if isinstance(value, dict) else value
    path = cluster.work / f"{name}-site.yaml"
    path.write_text(yaml.safe_dump(site))
    return path
