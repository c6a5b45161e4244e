"""The code as it was submitted: editing the checkout while a job waits changes nothing."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from pathlib import Path

import pipeline
from pipeline.files import fsync_file, publish_dir, write_json
from pipeline.run.provenance import SNAPSHOT_RECORD, git_state

_PARTS = ("pipeline", "pyproject.toml")


def take_snapshot(into: Path) -> None:
    """Copies the package and what it is installed from to a folder that appears whole, replacing an older one.

    Raises:
        OSError: The folder cannot be written.
    """
    source = Path(pipeline.__file__).parent.parent
    temp = into.with_name(f".{into.name}.{secrets.token_hex(4)}.tmp")
    try:
        for name in _files(source):
            target = temp / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target)
            fsync_file(target)
        write_json(temp / SNAPSHOT_RECORD, {"git": git_state(source / "pipeline"), "source": str(source)})
        if into.exists():
            shutil.rmtree(into)
        publish_dir(temp, into)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


def _files(source: Path) -> list[Path]:
    """What belongs to the package: what git has or would take, else everything but caches."""
    listed = subprocess.run(
        ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PARTS],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode == 0 and listed.stdout:
        return [Path(name) for name in listed.stdout.split("\0") if name and (source / name).is_file()]
    found = [path for part in _PARTS for path in (source / part, *(source / part).rglob("*")) if path.is_file()]
    return [path.relative_to(source) for path in found if "__pycache__" not in path.parts]
