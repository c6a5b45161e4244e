"""Checks of the environment that training will run in: inside the image, or with the Python that jobs start.

    python -m pipeline.check.node FOLDER... --open-files=N [--evaluate=SECTION]    # prints a JSON list of checks

This is a process of its own, because it imports torch and the harness of the tasks, which a login node need not have.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.check.result import Check
from pipeline.check.tasks import check_tasks
from pipeline.files import MAX_CLOCK_SKEW_S, clock_skew_s, nearest_existing
from pipeline.text_format import gigabytes

# NCCL's processes share memory through /dev/shm; 64 MB, the default of some containers, is not enough.
_MIN_SHM_GB = 1.0
_MIN_OPEN_FILES = 4096
NO_GPU = "no GPU"


def node_checks(folders: list[str], open_files: int, evaluate: dict[str, Any] | None = None) -> list[Check]:
    """Returns every check of this machine.

    Args:
        folders: Where training will write.
        open_files: How many keep all shards of the dataset mapped.
        evaluate: The config's section of that name, if it names tasks.
    """
    parts: list[Callable[[], Check]] = [lambda: _imports("torch"), lambda: _imports("deepspeed"), _devices]
    found = [part() for part in parts]
    if evaluate is not None:
        found.append(check_tasks(evaluate))
    found += [_writable(Path(folder)) for folder in folders]
    return [
        *found,
        _clock(Path(folders[0] if folders else ".")),
        _shared_memory(),
        _open_files(open_files),
        _locked_memory(),
    ]


def _imports(name: str) -> Check:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return Check(name, "failed", f"{error.name} is not installed", "install the extra: pip install '.[train]'")
    except Exception as error:  # a broken installation raises anything
        return Check(name, "failed", f"{type(error).__name__}: {error}", "install the extra: pip install '.[train]'")
    return Check(name, "ok", str(module.__version__))


def _devices() -> Check:
    try:
        import torch
    except ImportError:
        return Check("devices", "failed", "unknown without torch", "install the extra: pip install '.[train]'")
    if not torch.cuda.is_available():
        return Check("devices", "ok", f"{NO_GPU}, {len(os.sched_getaffinity(0))} CPU cores")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check("devices", "ok", ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)))


def _writable(folder: Path) -> Check:
    name = f"writable {folder}"
    place = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        return Check(name, "failed", error.strerror or str(error), "choose another folder, or bind it into the image")
    return Check(name, "ok", "yes" if place == folder else f"yes, {place} is")


def _clock(folder: Path) -> Check:
    """Compares this clock with that of the file system, which all nodes share."""
    try:
        skew = clock_skew_s(nearest_existing(folder))
    except OSError as error:
        return Check("clock", "warning", f"cannot be compared: {error.strerror}", "make the folder writable")
    if abs(skew) > MAX_CLOCK_SKEW_S:
        return Check("clock", "failed", f"{skew:+.0f} s against the file system's", "synchronize the clock (NTP)")
    return Check("clock", "ok", f"{skew:+.1f} s against the file system's")


def _shared_memory() -> Check:
    state = os.statvfs("/dev/shm")
    size = state.f_blocks * state.f_frsize
    if size < _MIN_SHM_GB * 1e9:
        return Check("/dev/shm", "warning", gigabytes(size, 2), f"enlarge it to {_MIN_SHM_GB:g} GB or more")
    return Check("/dev/shm", "ok", gigabytes(size))


def _open_files(needed: int) -> Check:
    """Compares what the dataset needs with the hard limit, up to which training raises the soft one itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        return Check("open files", "warning", f"{soft} (hard limit {hard})", f"ulimit -n {_MIN_OPEN_FILES} in `setup`")
    if hard != resource.RLIM_INFINITY and hard < needed:
        found = f"at most {hard}, and {needed} keep all shards of the dataset mapped"
        return Check("open files", "warning", found, "raise the hard limit; until then shards are mapped on each use")
    return Check("open files", "ok", str(soft))


def _locked_memory() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "unlimited")
    if Path("/dev/infiniband").exists():
        cure = "ulimit -l unlimited in `setup`; InfiniBand needs it"
        return Check("locked memory", "warning", f"{soft / 1e6:.0f} MB", cure)
    return Check("locked memory", "ok", f"{soft / 1e6:.0f} MB, enough without InfiniBand")


if __name__ == "__main__":
    given = [part for part in sys.argv[1:] if not part.startswith("--")]
    options = dict(part.removeprefix("--").split("=", 1) for part in sys.argv[1:] if part.startswith("--"))
    asked = json.loads(options["evaluate"]) if "evaluate" in options else None
    print(json.dumps([check.to_json() for check in node_checks(given, int(options["open-files"]), asked)]))
