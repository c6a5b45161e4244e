"""The wheels of an image, fetched on the host with its pip so that the build itself needs no network."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.files import sha256_bytes, staged_dir
from pipeline.image.base import Base

# pip matches platforms by exact name: manylinux_2_28 does not include NVIDIA's wheels, which are for manylinux_2_27.
_GLIBC_MINORS = range(36, 16, -1)

# The sources of the project's wheel.
PROJECT_PARTS = ("pipeline", "pyproject.toml", "README.md", "LICENSE")

# The line of a lock that says what it was resolved for.
_RESOLVED_FOR = re.compile(r"^#    make lock: (\S+)$", re.M)
_TORCH = re.compile(r"^torch==.*\n", re.M)

# What follows the release in the name of a torch wheel; PyPI's own, without a suffix, is for CUDA.
_TORCH_BUILDS = {"cpu": ("+cpu",), "cuda": ("+cu1", "-cp"), "rocm": ("+rocm",)}


def locks_of(accelerator: str, folder: Path, machine: str) -> list[Path]:
    """Returns the lock that all images share and, if there is one, that of torch's requirements on this accelerator.

    Args:
        accelerator: `cpu`, `cuda` or `rocm`.
        folder: Has a folder of locks for each machine.
        machine: `x86_64` or `aarch64`, as `uname -m` says.

    Raises:
        UsageError: There is no lock for this machine, or the one in its place was resolved for another.
    """
    known = sorted(found.parent.name for found in folder.glob("*/image.lock"))
    if machine not in known:
        raise UsageError(
            f"{folder}: has no lock for {machine}, only for {' and '.join(known)}; `make lock` writes one for each of "
            "MACHINES in the Makefile"
        )
    own = folder / machine / f"{accelerator}.lock"
    locks = [folder / machine / "image.lock", *([own] if own.is_file() else [])]
    for lock in locks:
        resolved = _RESOLVED_FOR.search(lock.read_text(encoding="utf-8"))
        if resolved is None or resolved[1] != machine:
            other = resolved[1] if resolved else "no machine that it names"
            raise UsageError(f"{lock}: was resolved for {other}, and this is {machine}; run `make lock`")
    return locks


def lock_digest(locks: Sequence[Path]) -> str:
    """Returns the SHA-256 over the locks of an image."""
    return sha256_bytes(b"".join(lock.read_bytes() for lock in locks))


def wheelhouse(base: Base, locks: Sequence[Path], store: Path, show: Callable[[str], None]) -> Path:
    """Returns a folder with a wheel of every package in the locks; wheels are fetched once per locks and base.

    Without torch and what it needs, if the base brings those.

    Raises:
        PipelineError: pip cannot fetch a wheel.
        UsageError: The torch that pip finds is built for another accelerator.
    """
    accelerator = "own" if base.brings_torch else base.accelerator
    key = sha256_bytes(f"{lock_digest(locks)} {accelerator} {base.python} {platform.machine()}".encode())[:12]
    house = store / f"{accelerator}-{key}"
    if house.is_dir():
        return house
    with staged_dir(house) as folder, tempfile.TemporaryDirectory() as temp:
        show("fetching wheels")
        target = _target(base.python)
        if base.brings_torch:
            rest = Path(temp) / "rest.lock"
            rest.write_text(_TORCH.sub("", locks[0].read_text(encoding="utf-8")), encoding="utf-8")
            locks = [rest]
        pins = [part for lock in locks for part in ("--requirement", str(lock))]
        _pip("download", "--no-deps", *target, "--dest", str(folder), *pins)
        if not base.brings_torch:
            torch = next(folder.glob("torch-*.whl"))
            _check_torch(torch, accelerator)
            if accelerator != "cpu" and len(locks) == 1:
                show("fetching what torch needs on this accelerator")
                only = ("--only-binary=:all:", "--find-links", str(folder), "--constraint", str(locks[0]))
                _pip("download", *only, *target, "--dest", str(folder), str(torch))
        for source in sorted(path for path in folder.iterdir() if path.suffix != ".whl"):
            show(f"building a wheel of {source.name}")
            _build_wheel(source, folder)
            source.unlink()
    return house


def project_wheel(root: Path, folder: Path, wheels: Path) -> None:
    """Builds the project's own wheel into a folder from a copy of the checkout, without leftovers of an earlier build.

    The wheelhouse holds the build requirements, so pip needs no index.
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
    """Builds a pure wheel from a source distribution or folder, without DeepSpeed's kernels, which are never used."""
    _pip("wheel", "--no-deps", *options, "--wheel-dir", str(folder), str(source), DS_BUILD_OPS="0")


def _target(python: str) -> tuple[str, ...]:
    """Returns the options that make pip select wheels for the Python of the image."""
    tag = f"cp{python.replace('.', '')}"
    machine = platform.machine()
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in _GLIBC_MINORS]
    platforms += [f"manylinux{year}_{machine}" for year in ("2014", "2010", "1")] + ["any"]
    return (
        *("--python-version", python, "--implementation", "cp", "--abi", tag, "--abi", "abi3", "--abi", "none"),
        *(part for name in platforms for part in ("--platform", name)),
    )


def _check_torch(wheel: Path, accelerator: str) -> None:
    version = wheel.name.removeprefix("torch-")
    release = version.split("+")[0].split("-")[0]
    if any(version.startswith(release + mark) for mark in _TORCH_BUILDS[accelerator]):
        return
    raise UsageError(
        f"pip finds {wheel.name}, which is not built for {accelerator}; point pip at the index or folder that has "
        f"torch {release} for {accelerator} (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; see docs/container.md)"
    )


def _pip(*arguments: str, **variables: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env={**os.environ, **variables})
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named" in line]
        reason = "; ".join(errors[-2:] or done.stderr.splitlines()[-1:])
        raise PipelineError(
            f"the wheels for the image could not be fetched: {reason}; is a package registry reachable?"
        )
