"""Collects what made a run: commit, package versions, host, job."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import UsageError
from pipeline.files import read_json

# The launcher sets these for the process inside a container.
IMAGE_VARIABLE = "PIPELINE_IMAGE"
IMAGE_SHA256_VARIABLE = "PIPELINE_IMAGE_SHA256"

SNAPSHOT_RECORD = "snapshot.json"
_PACKAGES = ("torch", "numpy", "deepspeed", "mlflow", "tokenizers", "gigatoken", "safetensors", "submitit", "pydantic")


def collect_provenance() -> dict[str, Any]:
    """Returns what is known about this start of a run, as plain JSON values."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "pipeline": pipeline.__version__,
        "git": git_state(Path(pipeline.__file__).parent),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "image": current_image(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def current_image() -> dict[str, str | None] | None:
    """Returns the image this process runs in and where its code comes from; None outside a container."""
    # Apptainer's own variable, for an image started by hand.
    path = os.environ.get(IMAGE_VARIABLE) or os.environ.get("APPTAINER_CONTAINER")
    if path is None:
        return None
    own = Path(pipeline.__file__).is_relative_to(sys.prefix)
    return {"path": path, "sha256": os.environ.get(IMAGE_SHA256_VARIABLE), "code": "image" if own else "snapshot"}


def refuse_other_image(starts: list[dict[str, Any]], image: Mapping[str, str | None] | None) -> None:
    """Refuses to resume a run in a different image than the last one it trained in.

    A start outside any image is allowed: its user sees what is installed there.

    Raises:
        UsageError: The image differs.
    """
    before = [s["image"] for s in starts if s.get("image") and s["image"]["sha256"] is not None]
    if image is None or not before or image["sha256"] == before[-1]["sha256"]:
        return
    raise UsageError(
        f"this run was trained in the image {before[-1]['path']} (sha256 {before[-1]['sha256']}), but this image is "
        f"{image['path']} (sha256 {image['sha256'] or 'unknown'}); resume in the former, or accept the change with "
        "`--allow-image-change`: both are recorded"
    )


def git_state(folder: Path) -> dict[str, Any]:
    """Returns commit and dirty flag of the checkout that holds the code; both None without one.

    Submitted code has a record of its source instead, because the checkout around a run folder changes.
    """
    record = folder.parent / SNAPSHOT_RECORD
    if record.is_file():
        return read_json(record)["git"]
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def untracked(folder: Path, parts: Sequence[str]) -> list[str]:
    """Returns the files below these parts of a checkout that git neither tracks nor ignores.

    Raises:
        subprocess.CalledProcessError: The folder is not a checkout.
    """
    return _git(folder, "ls-files", "--others", "--exclude-standard", "--", *parts).splitlines()


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *args], capture_output=True, text=True, errors="replace", check=True
    )
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
