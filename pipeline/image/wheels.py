"""The wheels that go into an image: fetched on the host by its own pip, so that the build needs no network."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.files import publish_dir, sha256_bytes

# Of the base images: Debian 12's.
PYTHON = "3.11"
# pip takes a platform by its very name: a wheel for manylinux_2_27 alone, as NVIDIA's are, is none for manylinux_2_28.
_GLIBC_MINORS = range(36, 16, -1)

# What the project's wheel is made of.
PROJECT_PARTS = ("pipeline", "slurm", "pyproject.toml", "README.md")

# How a wheel of torch says what it computes on; PyPI's own, without a mark, is the one for CUDA.
_TORCH_BUILDS = {"cpu": ("+cpu",), "cuda": ("+cu1", "-cp"), "rocm": ("+rocm",)}


def locks_of(accelerator: str, folder: Path) -> list[Path]:
    """The lock of all images, and the one of what torch for this accelerator needs besides, if there is one."""
    own = folder / f"{accelerator}.lock"
    return [folder / "image.lock", *([own] if own.is_file() else [])]


def lock_digest(locks: Sequence[Path]) -> str:
    """SHA-256 of what pins an image's packages."""
    return sha256_bytes(b"".join(lock.read_bytes() for lock in locks))


def wheelhouse(accelerator: str, locks: Sequence[Path], store: Path, say: Callable[[str], None]) -> Path:
    """A folder with a wheel of every package in the locks, fetched once for these locks and the accelerator.

    Args:
        accelerator: `cpu`, `cuda` or `rocm`: the build of torch.
        locks: Files of one `name==version` a line.
        store: Folder of the wheelhouses.
        say: Told what is being done.

    Raises:
        PipelineError: pip cannot get one.
        UsageError: The torch that pip finds is built for something else.
    """
    key = sha256_bytes(f"{lock_digest(locks)} {accelerator} {PYTHON} {platform.machine()}".encode())[:12]
    house = store / f"{accelerator}-{key}"
    if house.is_dir():
        return house
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store, prefix=f".{house.name}.") as temp:
        folder = Path(temp) / "wheels"
        say("fetching wheels")
        pins = [part for lock in locks for part in ("--requirement", str(lock))]
        _pip("download", "--no-deps", *_target(), "--dest", str(folder), *pins)
        torch = next(folder.glob("torch-*.whl"))
        _check_torch(torch, accelerator)
        if accelerator != "cpu" and len(locks) == 1:
            say("fetching what torch needs for the accelerator")
            only = ("--only-binary=:all:", "--find-links", str(folder), "--constraint", str(locks[0]))
            _pip("download", *only, *_target(), "--dest", str(folder), str(torch))
        for source in sorted(folder.glob("*.tar.gz")):
            say(f"making a wheel of {source.name}")
            _build_wheel(source, folder)
            source.unlink()
        publish_dir(folder, house)
    return house


def project_wheel(root: Path, folder: Path, wheels: Path) -> None:
    """Makes the project's own wheel from a copy of the checkout, so that no left-over of an earlier build gets in.

    Args:
        root: The checkout.
        folder: Gets the wheel.
        wheels: The wheelhouse; what builds the project is in it, so that no index is asked.
    """
    with tempfile.TemporaryDirectory() as temp:
        copy = Path(temp)
        for name in PROJECT_PARTS:
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(root / name, copy)
        _build_wheel(copy, folder, "--no-index", "--find-links", str(wheels))


def _build_wheel(source: Path, folder: Path, *options: str) -> None:
    """Makes a pure wheel from a source distribution or folder; DeepSpeed's kernels are left out, nothing uses them."""
    _pip("wheel", "--no-deps", *options, "--wheel-dir", str(folder), str(source), DS_BUILD_OPS="0")


def _target() -> tuple[str, ...]:
    """pip's words for the image's Python, whatever Python runs here."""
    tag = f"cp{PYTHON.replace('.', '')}"
    machine = platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS]
    platforms += [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")] + ["any"]
    return (
        *("--python-version", PYTHON, "--implementation", "cp", "--abi", tag, "--abi", "abi3", "--abi", "none"),
        *(part for name in platforms for part in ("--platform", name)),
    )


def _check_torch(wheel: Path, accelerator: str) -> None:
    version = wheel.name.removeprefix("torch-")
    release = version.split("+")[0].split("-")[0]
    if any(version.startswith(release + mark) for mark in _TORCH_BUILDS[accelerator]):
        return
    raise UsageError(
        f"pip finds {wheel.name}, which is not built for {accelerator}; point it at the index or folder that has "
        f"torch {release} for {accelerator} (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; see docs/container.md)"
    )


def _pip(*arguments: str, **variables: str) -> None:
    command: Sequence[str] = (
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        *arguments,
    )
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        raise PipelineError(
            "the wheels for the image could not be fetched: "
            + "; ".join(errors[-2:] or done.stderr.splitlines()[-1:])
            + "; is a package registry reachable?"
        )
