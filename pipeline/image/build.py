"""`pipeline image build`: builds an image of a checkout and its record; each becomes visible only when complete."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

import pipeline
from pipeline.errors import UsageError
from pipeline.files import naming, sha256_bytes
from pipeline.image.apptainer import RegistryNotReached, apptainer_version, build, run_inside
from pipeline.image.base import Base, read_base, without_registry
from pipeline.image.record import IMAGE_HOME, record_file, write_record
from pipeline.image.wheels import PROJECT_PARTS, lock_digest, locks_of, project_wheel, wheelhouse
from pipeline.run.provenance import git_state, untracked
from pipeline.terminal import Terminal
from pipeline.text_format import gigabytes

CONTAINERS = "containers"

_DIRTY = "-dirty"
# Debian with a compiler, and the byte code of the wheels' modules.
_BASE_BYTES, _COMPILED_BYTES = 0.6e9, 0.3e9


def checkout() -> Path:
    """Returns the checkout that this code runs from.

    Raises:
        UsageError: The code is installed instead.
    """
    root = Path(pipeline.__file__).parents[1]
    if (root / "Apptainer.def").is_file():
        return root
    raise UsageError(f"{root}: not a checkout of the project, which an image is built from; clone it and build there")


def commit_of(root: Path) -> str:
    """Returns the commit of a checkout, with `-dirty` if an image of it would differ; `unknown` without git."""
    state = git_state(root)
    if state["commit"] is None:
        return "unknown"
    dirty = state["dirty"] or untracked(root, PROJECT_PARTS)
    return f"{state['commit']}{_DIRTY if dirty else ''}"


def build_image(base_name: str, sandbox: bool) -> Path:
    """Builds an image of this checkout into `build/images`, tests it and records what it was built from.

    Raises:
        UsageError: The base cannot be used, or a program is missing.
        PipelineError: Wheels cannot be fetched, or the build or the image's own test failed.
    """
    root = checkout()
    base = read_base(base_name, root)
    version = apptainer_version()
    with _Steps() as steps:
        image = _build(root, base, sandbox, version, steps)
        steps.show("done")
    return image


def _build(root: Path, base: Base, sandbox: bool, apptainer: str, steps: _Steps) -> Path:
    commit = commit_of(root)
    if commit.endswith(_DIRTY):
        steps.show(f"files differ from the commit, so the image is recorded as {commit}; commit them for one to keep")
    images = _folder(root / "build" / "images")
    locks = locks_of(base.accelerator, root / CONTAINERS, platform.machine())
    wheels = wheelhouse(base, locks, root / "build" / "wheels", steps.show)
    _check_free_space(wheels, images if sandbox else _temporary_folder())
    image = images / f"pipeline-{base.name}{'' if sandbox else '.sif'}"
    temp = images / f".{image.name}.{secrets.token_hex(4)}"
    log = images / f"{image.name}.log"
    ours = {"VERSION": pipeline.__version__, "COMMIT": commit, "LOCK": lock_digest(locks)}
    try:
        with _context(root, wheels, locks, steps) as context:

            def run(base: Base) -> None:
                arguments = {**base.arguments, **ours}
                bind = f"{context}:/mnt:ro"
                build(root / "Apptainer.def", temp, arguments, bind, log, sandbox=sandbox, show=steps.show)

            steps.show(f"apptainer builds {image.name}; its output is in {log}")
            try:
                run(base)
            except RegistryNotReached as error:
                base = _made_by_debootstrap(base, error, steps)
                run(base)
        steps.show("computing the checksum")
        _publish(temp, image, {**_record(base, temp, {**base.arguments, **ours}), "apptainer": apptainer})
    finally:
        _remove(temp)
    return image


def _made_by_debootstrap(base: Base, error: RegistryNotReached, steps: _Steps) -> Base:
    """Returns the same bare Debian by debootstrap, and says so.

    Raises:
        RegistryNotReached: The base is no bare Debian.
        UsageError: debootstrap is not installed here, or apt has no mirror.
    """
    instead = without_registry(base)
    if instead is None:
        raise error
    steps.show(f"{error.reason}; the base is a bare Debian, so debootstrap makes it")
    return instead


def _folder(images: Path) -> Path:
    """Creates the folder of the images.

    Raises:
        UsageError: The folder cannot be written.
    """
    with naming(images, "cannot be written", "build from a clone in a folder of your own", UsageError):
        images.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=images.parent):
            pass
    return images


def _record(base: Base, image: Path, arguments: dict[str, str]) -> dict[str, Any]:
    """Returns what the image was built from, as plain JSON values."""
    python, system = (run_inside(image, "cat", f"{IMAGE_HOME}/{kind}-packages.txt") for kind in ("python", "system"))
    return {
        "base": {
            "bootstrap": base.arguments["BOOTSTRAP"],
            "name": base.arguments["FROM"],
            "digest": base.digest or f"sha256:{sha256_bytes(system.encode())}",
        },
        "accelerator": base.accelerator,
        "version": arguments["VERSION"],
        "commit": arguments["COMMIT"],
        "lock_sha256": arguments["LOCK"],
        "architecture": platform.machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python_packages": python.split(),
        "system_packages": system.split(),
    }


class _Steps:
    """Prints one line per step on stderr, with the seconds since the start, and shows a clock on a terminal."""

    def __init__(self) -> None:
        self._console = Terminal(stderr=True, soft_wrap=True)
        self._clock = Progress(
            SpinnerColumn(), TimeElapsedColumn(), console=self._console, transient=True,
            disable=not self._console.is_terminal,
        )  # fmt: skip
        self._began = time.monotonic()

    def __enter__(self) -> _Steps:
        self._clock.add_task("")
        self._clock.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._clock.stop()

    def show(self, what: str) -> None:
        self._console.print(f"[{time.monotonic() - self._began:4.0f} s] {what}")


@contextmanager
def _context(root: Path, wheels: Path, locks: list[Path], steps: _Steps) -> Iterator[Path]:
    """Yields the folder that the build sees as /mnt: links to the wheels, the project's own wheel, the locks."""
    with tempfile.TemporaryDirectory(dir=root / "build", prefix=".context.") as temp:
        context = Path(temp)
        (context / "wheels").mkdir()
        for wheel in wheels.iterdir():
            (context / "wheels" / wheel.name).hardlink_to(wheel)
        steps.show("making the project's wheel")
        project_wheel(root, context / "project", wheels)
        for lock in locks:
            shutil.copy(lock, context)
        yield context


def _temporary_folder() -> Path:
    """Returns the folder in which Apptainer unpacks an image before it packs the SIF file."""
    return Path(os.environ.get("APPTAINER_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _check_free_space(wheels: Path, folder: Path) -> None:
    """Raises UsageError if the unpacked image does not fit; debootstrap would only report a failed download."""
    needed = _BASE_BYTES + _COMPILED_BYTES
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as packed:
            needed += sum(member.file_size for member in packed.infolist())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"{folder}: {gigabytes(free)} are free, and the unpacked image needs {gigabytes(needed)} there; make room "
            "or export APPTAINER_TMPDIR=DIR on a larger disk"
        )


def _publish(temp: Path, image: Path, record: dict[str, Any]) -> None:
    """Renames the image into place and writes its record; a record never stands beside another image."""
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
