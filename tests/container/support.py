"""The CPU image, built by the command line once per state of its inputs, and jobs that run in it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.image.wheels import PROJECT_PARTS
from pipeline.launch.container.binds import create_folders
from pipeline.launch.container.command import container_argv, container_environment
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import Run
from tests.experiment import demo_text

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "build" / "images"
_INPUTS = ("Apptainer.def", "containers/cpu.args", f"containers/{platform.machine()}/image.lock", *PROJECT_PARTS)


def cpu_image() -> Path:
    """Returns `build/images/pipeline-cpu.sif`; builds it if it is missing or its inputs have changed."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    image, stamp = IMAGES / "pipeline-cpu.sif", IMAGES / "pipeline-cpu.inputs"
    # Several test processes may need it at the same time.
    with (IMAGES / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = _inputs()
        if not (image.exists() and stamp.exists() and stamp.read_text() == wanted):
            stamp.unlink(missing_ok=True)
            build("cpu")
            stamp.write_text(wanted)
    return image


def build(*options: str) -> str:
    """Builds an image of this checkout; returns the output of the command."""
    base, *more = options
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "image", "build", "--base", base, *more],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _inputs() -> str:
    total = hashlib.sha256()
    for name in _INPUTS:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                total.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


@dataclass(frozen=True)
class Jobs:
    """Runs commands of `pipeline` on the demo experiment, in the image and on the host."""

    folder: Path
    """The working folder, which holds the runs, the token shards and mlflow.db."""
    image: Path
    """The SIF file."""
    text: Path
    """The demo text."""

    def settings(self, name: str) -> list[str]:
        """Returns overrides of the demo: the same model and data, but few steps, each of them logged."""
        return [
            f"name={name}", f"container.image={self.image}", *demo_text(self.text), "train.device=cpu",
            "train.max_iters=8", "train.log_interval=1", "train.val_interval=1000", "train.num_val_batches=1",
            "train.checkpoint_interval=1000",
        ]  # fmt: skip

    def config(self, name: str, *overrides: str) -> Config:
        """Loads the config of the experiment under a name."""
        return load_config(self.folder / "demo.yaml", [*self.settings(name), *overrides])

    def run(self, name: str) -> Run:
        """Returns the run of that name."""
        return Run(self.folder / "runs" / name)

    def argv(self, name: str, *command: str, code: Path | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
        """Returns the container command of one rank, as the launcher builds it."""
        config = self.config(name, *overrides)
        with contextlib.chdir(self.folder):
            create_folders(config, self.run(name))
            return container_argv(
                config, SiteContainer(), self.run(name), command, environment={"OMP_NUM_THREADS": "1"}, code=code
            )

    def command(self, name: str, verb: str, *overrides: str) -> list[str]:
        """Returns a command line of `pipeline` on the experiment."""
        return ["pipeline", verb, "demo.yaml", *self.settings(name), *overrides]

    def inside(
        self, name: str, verb: str, *overrides: str, code: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the image."""
        argv = self.argv(name, *self.command(name, verb, *overrides), code=code)
        environment = container_environment(SiteContainer(), os.environ)
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=280)

    def on_host(self, name: str, verb: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        """Runs a command with the Python that runs the tests."""
        return subprocess.run(
            [sys.executable, "-m", *self.command(name, verb, *overrides)],
            cwd=self.folder, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    def losses(self, name: str) -> dict[int, float]:
        """Returns the training loss of every step of a run."""
        return {r["step"]: r["train/loss"] for r in records(self.run(name).metrics_file) if "train/loss" in r}

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Returns the events of one kind of a run."""
        file = self.run(name).events_file
        return [r for r in records(file) if r["event"] == kind] if file.exists() else []


def records(file: Path) -> list[dict[str, Any]]:
    """Returns the records of a journal."""
    return [json.loads(line) for line in file.read_text().splitlines()]
