"""A cluster made of scripts, for what sbatch says and Slurm is asked; jobs run on a real one, in tests/cluster."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.run.folder import Run, create_run

ROOT = Path(__file__).parents[2]

CONFIG: dict[str, Any] = {
    "name": "tiny",
    "runs_dir": "runs",
    "data": {"path": "tokens", "sources": [{"name": "text", "paths": ["text/*.txt"]}]},
    "tokenizer": {"kind": "bytes"},
    "model": {"vocab_size": 257, "context_length": 8, "d_model": 8, "num_layers": 1, "num_heads": 2, "d_ff": 16},
    "optimizer": {"learning_rate": 0.01, "min_learning_rate": 0.0, "warmup_iters": 0, "cosine_cycle_iters": 100},
    "train": {"batch_size": 16, "micro_batch_size": 2, "max_iters": 100},
    "tracking": {"uri": "none"},
}
SITE: dict[str, Any] = {"name": "here", "prepare": {"slices": 2}, "train": {"nodes": 2, "time_limit_min": 30}}

# Prints what the test put into NAME.out and NAME.err, notes its arguments, and ends with the status in NAME.rc.
# The n-th call takes NAME.n.out and so on, where they are there.
_FAKE = """#!/bin/sh
cd {folder} || exit 99
n=$(($(cat {name}.count 2>/dev/null || echo 0) + 1)); echo $n > {name}.count
printf '%s\\n' "{name} $*" >> calls
f={name}.$n; [ -e $f.out ] || [ -e $f.err ] || [ -e $f.rc ] || f={name}
cat $f.out 2>/dev/null; cat $f.err >&2 2>/dev/null; exit $(cat $f.rc 2>/dev/null || echo 0)
"""


@dataclass(frozen=True)
class FakeSlurm:
    """Slurm's commands as scripts.

    Attributes:
        folder: Where they are, and what they are to say.
    """

    folder: Path

    def says(self, name: str, out: str = "", *, err: str = "", status: int = 0, call: int | None = None) -> None:
        """What a command prints and how it ends, always or at its `call`-th call."""
        stem = name if call is None else f"{name}.{call}"
        (self.folder / f"{stem}.out").write_text(out)
        (self.folder / f"{stem}.err").write_text(err)
        (self.folder / f"{stem}.rc").write_text(str(status))

    def calls(self, name: str) -> list[str]:
        """The arguments of every call of a command."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    @property
    def path(self) -> str:
        """PATH with these commands first."""
        return f"{self.folder}:{os.environ['PATH']}"


def fake_slurm(folder: Path) -> FakeSlurm:
    """Slurm's commands in a folder; they succeed and print nothing but a job id."""
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel", "sacct", "sinfo"):
        script = folder / name
        script.write_text(_FAKE.format(folder=folder, name=name))
        script.chmod(0o755)
    fake = FakeSlurm(folder)
    for number in range(1, 10):
        fake.says("sbatch", f"Submitted batch job {100 + number}\n", call=number)
    return fake


@dataclass(frozen=True)
class Done:
    """How a command ended, and the CPU seconds it took."""

    status: int
    out: str
    err: str
    cpu_s: float


def write_files(folder: Path, config: dict[str, Any] | None = None, site: dict[str, Any] | None = None) -> None:
    """config.yaml, site.yaml, and a text to prepare."""
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("We hold these truths to be self-evident. " * 50)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config))
    (folder / "site.yaml").write_text(yaml.safe_dump(SITE if site is None else site))


def make_run(folder: Path, monkeypatch: Any) -> tuple[Run, Config]:
    """A run folder as submission makes it; the working folder is `folder` from now on."""
    write_files(folder)
    monkeypatch.chdir(folder)
    config = load_config("config.yaml")
    run = create_run(config)
    run.launch.mkdir()
    return run, config


BASE = {"from": "/runs/base/checkpoints/step_00000004", "digest": "b" * 64, "step": 4, "what": "all"}
FIRST = {"from": "hf:/models/first", "digest": "f" * 64}


def branched(run: Run) -> Run:
    """Records that a run branched from one that started from open weights."""
    run.add_provenance({"init": {**BASE, "mlflow_run_id": "a1", "differences": [], "ancestors": [FIRST]}})
    return run


def pipeline(folder: Path, *args: str, slurm: FakeSlurm | None = None) -> Done:
    """Runs the command line in a folder."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": slurm.path if slurm else os.environ["PATH"]}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *args], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(done.returncode, done.stdout, done.stderr, cpu)


def events(run: Path) -> list[dict[str, Any]]:
    """What events.jsonl of a run holds."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def submit(folder: Path, slurm: FakeSlurm, *args: str) -> Done:
    """`pipeline submit config.yaml --site site.yaml`."""
    return pipeline(folder, "submit", "config.yaml", "--site", "site.yaml", *args, slurm=slurm)
