"""What made a run: commit, package versions, host, job."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline
from pipeline.files import read_json

SNAPSHOT_RECORD = "snapshot.json"
_PACKAGES = ("torch", "numpy", "deepspeed", "mlflow", "tokenizers", "gigatoken", "safetensors", "submitit", "pydantic")


def collect_provenance() -> dict[str, Any]:
    """What is known about this start of a run, as plain JSON values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "pipeline": pipeline.__version__,
        "git": git_state(Path(pipeline.__file__).parent),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirty flag of the checkout that holds the code; both None where there is none.

    Code that was submitted says itself what it was copied from: the checkout around a run folder moves on.
    """
    record = folder.parent / SNAPSHOT_RECORD
    if record.is_file():
        return read_json(record)["git"]
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
