"""Publishing files so that half of one is never visible, reading files that others made, and digests."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from pipeline.errors import STORAGE_FAILS, PipelineError, UsageError

# Deadlines and the times of events are compared between nodes.
MAX_CLOCK_SKEW_S = 5.0

# The manifest of a checkpoint by a thousand ranks, or of a dataset of a hundred thousand shards, is a fifth of this.
LARGEST_JSON = 256 << 20


@contextlib.contextmanager
def naming(place: object, what: str, cure: str = "", error: type[PipelineError] = PipelineError) -> Iterator[None]:
    """Turns an OSError of the block into one message that names the place, the reason and the cure.

    Args:
        place: The file, folder or config key that the message begins with.
        what: What failed: `cannot be read`.
        cure: What the user can change; empty if nothing.
        error: The type that is raised; storage that fails is never a UsageError.
    """
    try:
        yield
    except OSError as problem:
        remedy = f"; {cure}" if cure else ""
        if issubclass(error, UsageError) and problem.errno in STORAGE_FAILS:
            error = PipelineError  # no mistake of the user's: trying again may help
        raise error(f"{place}: {what} ({problem.strerror or problem}){remedy}") from problem


@contextlib.contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of the block that names none: what fails on a descriptor does not know its file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def fsync_dir(path: Path) -> None:
    """Makes the names in a folder durable; without it a rename can be lost in a power failure."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def fsync_file(path: Path) -> None:
    """Makes the bytes of a finished file durable."""
    _fsync(path, os.O_RDONLY)


def _fsync(path: Path, flags: int) -> None:
    with of_file(path):
        fd = os.open(path, flags)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_bytes(path: Path, content: bytes | bytearray) -> None:
    """Publishes a file whole: readers see the old bytes or the new ones, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: two containers on two nodes that share a folder often have the same one.
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with of_file(path), temp.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temp.replace(path)
    except OSError:
        temp.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def is_temporary(path: Path, names: Sequence[str]) -> bool:
    """Whether a file is what a killed `write_bytes` of one of these names leaves beside it."""
    return any(re.fullmatch(rf"\.{re.escape(name)}\.[0-9a-f]{{12}}\.tmp", path.name) for name in names)


def write_text(path: Path, text: str) -> None:
    """Publishes a UTF-8 text file whole."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Publishes a JSON file whole, indented for people to read."""
    content = bytearray()
    # Not json.dumps, which first makes a list of all the pieces: some hundred bytes for each word of the file.
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(value):
        content += piece.encode()
    content += b"\n"
    write_bytes(path, content)


def open_regular(path: str | Path, inside: str | Path | None = None) -> BufferedReader:
    """Opens a file that others may have made, and refuses everything that is not a regular file.

    A device has no end, a FIFO blocks, and a link can name any file of the user, which a report would then publish.

    Args:
        path: The file.
        inside: The folder that was received; no link may lead out of it. The folder itself may be a link.

    Raises:
        OSError: It cannot be opened, is not a regular file, or is outside the folder.
    """
    fd = _find_regular(path, inside)
    try:
        return os.fdopen(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC), "rb")
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)


def size_of_regular(path: str | Path, inside: str | Path | None = None) -> int:
    """Returns the size of a file in bytes, with the conditions and errors of `open_regular`."""
    fd = _find_regular(path, inside)
    try:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def is_regular(path: str | Path, inside: str | Path | None = None) -> bool:
    """Whether `open_regular` would open the file."""
    try:
        size_of_regular(path, inside)
    except (OSError, ValueError):  # ValueError: a null character in the name
        return False
    return True


def _find_regular(path: str | Path, inside: str | Path | None) -> int:
    """Returns a descriptor that names the file without opening it: a FIFO would wait, and a device may do something."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if inside is not None and not _place(fd).startswith(_folder_place(inside)):
            raise PermissionError(errno.EPERM, f"a link leads out of {inside}", str(path))
    except OSError:
        os.close(fd)
        raise
    return fd


def _folder_place(folder: str | Path) -> str:
    fd = os.open(folder, os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY)
    try:
        return _place(fd).rstrip("/") + "/"
    finally:
        os.close(fd)


def _place(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115  # called for each of a hundred thousand shards


def read_bounded(path: str | Path, inside: str | Path | None = None, most: int = LARGEST_JSON) -> bytes:
    """Reads a file that others may have made; see `open_regular`.

    Args:
        path: The file.
        inside: The folder that was received.
        most: The largest size that is read, in bytes.

    Raises:
        OSError: As `open_regular`, or the file is larger.
    """
    with open_regular(path, inside) as source:
        content = source.read(min(os.fstat(source.fileno()).st_size, most) + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
    return content


def parse_json(content: bytes) -> Any:
    """Parses JSON of any origin.

    Raises:
        ValueError: It is no JSON, holds half a surrogate pair, or is nested too deeply.
    """
    try:
        value = json.loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()  # a lone half could be neither printed nor written
    return value


def read_json(path: Path, inside: Path | None = None, error_type: type[PipelineError] = PipelineError) -> Any:
    """Reads a JSON file that others may have made.

    Args:
        path: The file.
        inside: The folder that was received.
        error_type: The type that is raised.

    Raises:
        PipelineError: The file is missing, is not a regular file in that folder, or is no JSON; the message names it.
    """
    try:
        with naming(path, "cannot be read", error=error_type):
            return parse_json(read_bounded(path, inside))
    except ValueError as error:
        raise error_type(f"{path}: is not valid JSON ({error})") from error


def publish_dir(temp: Path, final: Path) -> None:
    """Makes a finished folder visible under its name by one rename.

    The files inside must have been fsynced by whoever wrote them.

    Raises:
        OSError: `final` is a folder that is not empty; nothing is overwritten.
    """
    fsync_dir(temp)
    temp.rename(final)
    fsync_dir(final.parent)


@contextlib.contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """Yields an empty folder beside `final` that takes its name when the block succeeds and is removed when it fails.

    The files inside must be fsynced by whoever writes them; see `publish_dir`.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temp = final.with_name(f".{final.name}.{secrets.token_hex(6)}.tmp")
    temp.mkdir()
    try:
        yield temp
        publish_dir(temp, final)
    except BaseException:
        discard(temp)
        raise


def discard(folder: Path) -> None:
    """Removes a folder as far as possible; what stays is hidden, and removed later."""
    with contextlib.suppress(OSError):  # rmtree itself stumbles over a descriptor that cannot be closed
        shutil.rmtree(folder, ignore_errors=True)


def nearest_existing(path: Path) -> Path:
    """Returns the path itself, or the first folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def clock_skew_s(folder: Path) -> float:
    """Seconds by which this machine's clock is ahead of the one that stamps files in `folder`: all nodes share it.

    Raises:
        OSError: Nothing can be written there.
    """
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(b"x")
        return time.time() - os.fstat(file.fileno()).st_mtime


def sha256_bytes(content: bytes) -> str:
    """The SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path, inside: Path | None = None, part: range | None = None) -> str:
    """The SHA-256 of a file, or of a range of its bytes, in hexadecimal; see `open_regular` for `inside`."""
    with open_regular(path, inside) as source:
        if part is None:
            return hashlib.file_digest(source, "sha256").hexdigest()
        digest, left = hashlib.sha256(), len(part)
        source.seek(part.start)
        while left > 0 and (piece := source.read(min(left, 1 << 20))):
            digest.update(piece)
            left -= len(piece)
        return digest.hexdigest()
