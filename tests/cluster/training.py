"""A small training run on a devcluster, submitted as a person would submit it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.layout import Manifest, step_name
from pipeline.launch import records
from pipeline.run import Run
from tests import experiment
from tests.cluster.support import ENDED, ROOT, Cluster, wait_until

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
    """A run that was submitted.

    Attributes:
        cluster: Where.
        run: The run folder.
        config: Its config file.
        site: The site file.
        overrides: Dotted ones.
    """

    cluster: Cluster
    run: Path
    config: Path
    site: Path
    overrides: tuple[str, ...]

    def submit(self) -> str:
        """Submits all stages that are not done; returns what was printed."""
        done = self.pipeline("submit", str(self.config), "--site", str(self.site), *self.overrides)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pipeline(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Runs the command line of this checkout in a shell of the cluster."""
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *args],
            cwd=ROOT, env=self.cluster.env, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def job(self, stage: records.Stage) -> str:
        """Id of the stage's newest job."""
        return [job.id for job in records.jobs(Run(self.run)) if job.stage == stage][-1]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return experiment.events(self.run, kind)

    def wait_for_step(self, step: int, seconds: float = 240) -> None:
        """Waits until training has logged this step."""
        wait_until(lambda: experiment.last_step(self.run) >= step, seconds, lambda: f"no step {step}\n{self.words()}")

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until the condition holds; fails with everything that the jobs said."""
        wait_until(condition, seconds, lambda: f"{what}\n{self.words()}")

    def wait_for_end(self, stage: records.Stage, seconds: float = 300) -> dict[str, str]:
        """Waits until the stage's job has ended for good; returns what Slurm knows of it."""
        job = self.job(stage)

        def ended() -> bool:
            return self.cluster.show(job)["JobState"] in ENDED

        self.wait_for(ended, seconds, f"the job of {stage} has not ended")
        return self.cluster.show(job)

    def new_step_after(self, moment: float) -> float:
        """Unix time of the first step that a restart after `moment` took anew."""
        begun = min(e["time"] for e in self.events("resumed") if e["time"] > moment)
        return min(m["time"] for m in experiment.lines(self.run / "metrics.jsonl") if m["time"] > begun)

    def words(self) -> str:
        """The ends of all logs, for the message of a failing test."""
        files = sorted(
            [*self.run.glob("launch/*.err"), *self.run.glob("logs/*/*.log"), *self.run.glob("*events.jsonl")]
        )
        parts = [f"--- {path.relative_to(self.run)}\n{path.read_text(errors='replace')[-1500:]}" for path in files]
        return "\n".join([self.cluster.run("squeue", check=False), *parts])


def start(cluster: Cluster, name: str, *overrides: str, **site: Any) -> Training:
    """Submits a run of the small experiment.

    Args:
        cluster: Where.
        name: Of the run.
        overrides: Dotted ones, after the experiment's own.
        site: Values that replace those of the site file; a mapping is merged.
    """
    config = experiment.write_experiment(cluster.work, cluster.work / "runs", name)
    training = Training(
        cluster, cluster.work / "runs" / name, config, _site_file(cluster, name, site), (*_OVERRIDES, *overrides)
    )
    training.submit()
    return training


def assert_same_training(run: Path, reference: Path) -> None:
    """Every loss of every step, once, and every byte of the last weights and moments, are the reference's."""
    assert experiment.curve(run) == experiment.curve(reference)
    assert experiment.validations(run) == experiment.validations(reference)
    last = [Manifest.load(r / "checkpoints" / step_name(STEPS)).files for r in (run, reference)]
    assert last[0] == last[1]


def assert_same_beginning(run: Path, reference: Path) -> None:
    """Every loss that is there is the reference's."""
    found = experiment.curve(run)
    assert found == experiment.curve(reference)[: len(found)]


def processes_of(cluster: Cluster, node: str, words: str) -> list[int]:
    """Processes on a node whose command line holds these words, by the machine's own numbers."""
    from slurm.devcluster.hosts import pid_of

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
    """The clock that events carry."""
    return time.time()


def _site_file(cluster: Cluster, name: str, changes: dict[str, Any]) -> Path:
    site = yaml.safe_load((ROOT / "slurm" / "sites" / "devcluster.yaml").read_text())
    for key, value in changes.items():
        site[key] = {**site.get(key, {}), **value} if isinstance(value, dict) else value
    path = cluster.work / f"{name}-site.yaml"
    path.write_text(yaml.safe_dump(site))
    return path
