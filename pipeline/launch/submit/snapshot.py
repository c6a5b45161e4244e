"""A copy of the code as it was submitted: editing the checkout while a job waits changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pipeline
from pipeline.files import fsync_file, staged_dir, write_json
from pipeline.run.provenance import SNAPSHOT_RECORD, git_state

_PARTS = ("pipeline", "pyproject.toml")


def take_snapshot(into: Path) -> None:
    """Copies the package and its project file to a folder that appears whole and replaces an older one.

    Raises:
        OSError: The folder cannot be written.
    """
    source = Path(pipeline.__file__).parent.parent
    with staged_dir(into) as temp:
        for name in _files(source):
            target = temp / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
            fsync_file(target)
        write_json(temp / SNAPSHOT_RECORD, {"git": git_state(source / "pipeline"), "source": str(source)})
        if into.exists():
            shutil.rmtree(into)


def share_snapshot(taken: Path, into: Path) -> None:
    """Does what `take_snapshot` did for another folder, by hard links: a sweep has one code and many runs.

    Raises:
        OSError: The folder cannot be written.
    """
    with staged_dir(into) as temp:
        shutil.copytree(taken, temp, copy_function=_link, dirs_exist_ok=True)
        if into.exists():
            shutil.rmtree(into)


def _link(file: str, target: str) -> None:
    try:
        os.link(file, target)
    except OSError:  # some file systems have none
        shutil.copyfile(file, target)


def _files(source: Path) -> list[Path]:
    """Returns the files of the package: those that git tracks or would add, else everything but caches."""
    listed = subprocess.run(
        ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PARTS],
        capture_output=True, text=True, errors="surrogateescape", check=False,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        return [Path(name) for name in listed.stdout.split("\0") if name and (source / name).is_file()]
    found = [path for part in _PARTS for path in (source / part, *(source / part).rglob("*")) if path.is_file()]
    return [path.relative_to(source) for path in found if "__pycache__" not in path.parts]
