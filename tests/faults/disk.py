"""A small disk for a run, which can be filled or made read-only; needs its own mount namespace (`unshare -m`)."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

# What metrics and events need while the disk is full for checkpoints.
_ROOM_FOR_LINES = 96 * 1024


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """Mounts a tmpfs of this size while the block runs."""
    path.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path))
    try:
        yield path
    finally:
        _umount(path)


@contextlib.contextmanager
def full(path: Path) -> Iterator[None]:
    """Fills the disk so that no checkpoint fits while the block runs."""
    filler = path / "filler"
    while not _filled(filler):
        pass
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Makes everything below the folder unchangeable, for root too, while the block runs."""
    _mount("--bind", str(path), str(path))
    try:
        _refuse_writers(path)
        yield
    finally:
        _umount(path)


def _refuse_writers(path: Path, timeout_s: float = 10.0) -> None:
    """Makes a mount read-only as soon as no rank has a file open for writing there: until then it is busy."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            return _mount("-o", "remount,bind,ro", str(path))
        except subprocess.CalledProcessError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _filled(filler: Path) -> bool:
    """Says whether a file took the free space; a checkpoint that is being written may have been quicker."""
    state = os.statvfs(filler.parent)
    free = state.f_bavail * state.f_frsize
    with filler.open("wb") as out:
        try:
            os.posix_fallocate(out.fileno(), 0, max(4096, free - _ROOM_FOR_LINES))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return free < _ROOM_FOR_LINES
    return True


def _mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True)


def _umount(path: Path) -> None:
    # Lazily: a rank may be looking into it at this moment.
    subprocess.run(["umount", "--lazy", str(path)], check=True)
