"""`pipeline image build`: from a checkout to an image and its record, both visible only when whole."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import PipelineError, UsageError
from pipeline.files import sha256_bytes, sha256_file
from pipeline.launch.binds import IMAGE_HOME
from pipeline.launch.image_base import read_base
from pipeline.launch.image_record import record_file, write_record
from pipeline.launch.wheels import project_wheel, wheelhouse
from pipeline.provenance import git_state

COMMAND = "apptainer"
LOCK = Path("containers/image.lock")

# gzip, the default, takes four times the time for a file that is no smaller.
_SQUASH = "-comp zstd -Xcompression-level 1"
_TAIL_LINES = 15


def checkout() -> Path:
    """The checkout that this code is in.

    Raises:
        UsageError: The code is installed; an image is built from a checkout.
    """
    root = Path(pipeline.__file__).parents[1]
    if (root / "Apptainer.def").is_file():
        return root
    raise UsageError(f"an image is built from a checkout of the project, and {root} is none; clone it and run it there")


def commit_of(root: Path) -> str:
    """The commit of a checkout, marked where files differ from it; `unknown` without git."""
    state = git_state(root)
    return f"{state['commit']}{'-dirty' if state['dirty'] else ''}" if state["commit"] else "unknown"


def build_image(base_name: str, sandbox: bool) -> Path:
    """Builds an image of this checkout into `build/images`, tests it, and records what it was built from.

    Args:
        base_name: One of `containers/*.args`, or the path of another argument file.
        sandbox: A folder in place of a SIF file.

    Raises:
        UsageError: The base is not usable, or a program is missing.
        PipelineError: Wheels cannot be fetched, or the build or the image's own test failed.
    """
    root = checkout()
    base = read_base(base_name, root)
    version = apptainer_version()
    steps = _Steps()
    wheels = wheelhouse(base.accelerator, root / LOCK, root / "build" / "wheels", steps.say)
    images = root / "build" / "images"
    images.mkdir(parents=True, exist_ok=True)
    image = images / f"pipeline-{base.name}{'' if sandbox else '.sif'}"
    temp = images / f".{image.name}.{secrets.token_hex(4)}"
    log = images / f"{image.name}.log"
    arguments = {
        **base.arguments,
        "VERSION": pipeline.__version__,
        "COMMIT": commit_of(root),
        "LOCK": sha256_file(root / LOCK),
    }
    try:
        with _context(root, wheels, steps) as context:
            steps.say(f"apptainer builds {image.name} and tests it; its own words are in {log}")
            _apptainer_build(root / "Apptainer.def", temp, arguments, context, log, sandbox)
        record: dict[str, Any] = {
            "base": {
                "bootstrap": base.arguments["BOOTSTRAP"],
                "name": base.arguments["FROM"],
                "digest": base.digest or f"sha256:{sha256_bytes(_inside(temp, 'system-packages.txt').encode())}",
            },
            "accelerator": base.accelerator,
            "version": pipeline.__version__,
            "commit": arguments["COMMIT"],
            "lock_sha256": arguments["LOCK"],
            "architecture": platform.machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "apptainer": version,
            "python_packages": _inside(temp, "python-packages.txt").split(),
            "system_packages": _inside(temp, "system-packages.txt").split(),
        }
        steps.say("computing the checksum")
        _publish(temp, image, record)
    finally:
        _remove(temp)
    steps.say("done")
    return image


class _Steps:
    """What a person sees: a line a step, with the seconds since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._began:4.0f} s] {what}", flush=True)


def apptainer_version() -> str:
    """The version of the Apptainer that is installed.

    Raises:
        UsageError: None is.
    """
    if shutil.which(COMMAND) is None:
        raise UsageError(f"{COMMAND} is not there; install it or load its module (docs/container.md)")
    return subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]


@contextmanager
def _context(root: Path, wheels: Path, steps: _Steps) -> Iterator[Path]:
    """The folder that the build sees as /mnt: links to the wheels, the project's own wheel, the lock."""
    with tempfile.TemporaryDirectory(dir=root / "build", prefix=".context.") as temp:
        context = Path(temp)
        (context / "wheels").mkdir()
        for wheel in wheels.iterdir():
            (context / "wheels" / wheel.name).hardlink_to(wheel)
        steps.say("making the project's wheel")
        project_wheel(root, context / "project")
        shutil.copy(root / LOCK, context)
        yield context


def _apptainer_build(
    definition: Path, target: Path, arguments: dict[str, str], context: Path, log: Path, sandbox: bool
) -> None:
    command = [COMMAND, "build", *(["--sandbox"] if sandbox else ["--mksquashfs-args", _SQUASH])]
    command += [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
    environment = {**os.environ, "APPTAINER_BIND": f"{context}:/mnt:ro"}
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run([*command, str(target), str(definition)], stdout=out, stderr=out, env=environment)
    if done.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        raise PipelineError("\n  ".join([f"apptainer could not build the image; the end of {log}:", *tail]))


def _inside(image: Path, name: str) -> str:
    """A text file that %post left in the image."""
    command = [COMMAND, "exec", "--no-mount", "home,cwd", str(image), "cat", str(IMAGE_HOME / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise PipelineError(f"the image was built and cannot be started: {done.stderr.strip()}")
    return done.stdout


def _publish(temp: Path, image: Path, record: dict[str, Any]) -> None:
    """Puts image and record in their places; a record never stands beside an image that it is not about."""
    record_file(image).unlink(missing_ok=True)
    if image.is_dir():
        old = image.with_name(f".{image.name}.{secrets.token_hex(4)}.old")
        image.rename(old)
        _remove(old)
    temp.rename(image)
    write_record(image, record)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
