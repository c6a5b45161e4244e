"""Reads and appends JSON lines that stay readable after kill -9 at any moment.

One `write` writes one record as one line. A killed writer may leave a last line without a newline: readers ignore
it, and the next writer cuts it off.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from pipeline.files import fsync_file, naming, of_file, open_regular, write_bytes

_BLOCK = 1 << 20
_LONGEST_LINE = 16 << 20
# Longer numbers are no counts; as floats they stay numbers of bounded size.
_LONGEST_INT = 18
_END_OF_TIME = 1e11  # Unix seconds, in the year 5138
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Line:
    """One complete line of a journal."""

    record: dict[str, Any]
    """The parsed object."""
    raw: bytes
    """The bytes of the line, including its newline."""
    end: int
    """Offset of the byte after the line."""


def encode(record: Mapping[str, Any]) -> bytes:
    """Returns a record as the bytes of a line: strict JSON, with NaN and infinities as text that `read` turns back."""
    # A path that is not UTF-8 has halves of surrogate pairs, which no file can hold.
    strict = {k: _name(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(strict, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def read(path: Path, offset: int = 0) -> Iterator[Line]:
    """Yields the complete lines of a journal from a byte offset; none where there is no file.

    It skips a last line without a newline and any line that is not a JSON object (two torn writes).

    Raises:
        PipelineError: It cannot be read, is not a regular file, or a link leads out of its folder.
    """
    source = _open(path)
    if source is None:
        return
    with source:
        source.seek(offset)
        end, whole = offset, True
        while raw := source.readline(_LONGEST_LINE):
            end += len(raw)
            if not raw.endswith(b"\n"):
                whole = False  # the rest of an endless line is no record, nor is a last line without a newline
                continue
            record = _parse(raw) if whole else None
            whole = True
            if record is not None:
                yield Line(record, raw, end)


def _open(path: Path) -> BufferedReader | None:
    with naming(path, "cannot be read"):
        try:
            return open_regular(path, path.parent)
        except FileNotFoundError:
            return None


def read_steps(path: Path, offset: int = 0) -> Iterator[Line]:
    """Yields the lines of a journal of metrics, like `read`, whose step and time are usable; records hold numbers only.

    Others may have written the file: what is no metric is skipped like a torn line.
    """
    for line in read(path, offset):
        record = _metrics(line.record)
        if record is not None:
            yield Line(record, line.raw, line.end)


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw, parse_int=_number)
        if b"\\ud" in raw.lower():
            json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return {k: _NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}


def _number(text: str) -> int | float:
    return int(text) if len(text) < _LONGEST_INT else float(text)


def _metrics(record: dict[str, Any]) -> dict[str, Any] | None:
    step, at = record.get("step"), record.get("time", -1)
    if not isinstance(step, int) or step < 0 or not isinstance(at, (int, float)) or not 0 <= at < _END_OF_TIME:
        return None
    return {key: value for key, value in record.items() if type(value) in (int, float)}


def last(path: Path) -> dict[str, Any] | None:
    """Returns the last complete record, searching from the end of the file; None without one."""
    return _newest(path, lambda record: record)


def last_step(path: Path) -> dict[str, Any] | None:
    """Returns the last record that `read_steps` would yield; None without one."""
    return _newest(path, _metrics)


def _newest(path: Path, usable: Callable[[dict[str, Any]], dict[str, Any] | None]) -> dict[str, Any] | None:
    source = _open(path)
    if source is None:
        return None
    with source:
        end = source.seek(0, os.SEEK_END)
        tail = b""
        while end > 0 and len(tail) < _LONGEST_LINE:
            start = max(0, end - _BLOCK)
            source.seek(start)
            tail = source.read(end - start) + tail
            end = start
            # The block's edge may cut its first piece, which therefore counts only at the start of the file.
            pieces = tail.split(b"\n")[:-1]
            for raw in reversed(pieces if start == 0 else pieces[1:]):
                record = _parse(raw)
                found = None if record is None else usable(record)
                if found is not None:
                    return found
    return None


def size(path: Path) -> int:
    """Returns the size of a journal in bytes; 0 where there is no file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def repair(path: Path) -> None:
    """Cuts off the incomplete last line of a killed writer."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = before = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < before:
            file.truncate(end)


def make_durable(path: Path) -> None:
    """Waits until the current contents of the file would survive a power failure."""
    if path.exists():
        fsync_file(path)


def replace(path: Path, lines: Iterable[bytes]) -> None:
    """Publishes a new journal; readers no longer see what a writer adds to the old file."""
    write_bytes(path, b"".join(lines))


class Writer:
    """Appends records to a file that no other process writes to."""

    def __init__(self, path: Path) -> None:
        repair(path)
        self._path = path
        self._torn: int | None = None  # where a part of a line begins that could not be cut off yet
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)

    def write(self, raw: bytes) -> None:
        """Appends complete lines with one write.

        Raises:
            OSError: The disk is full or failing; no part of the lines stays in the file once it can be written again.
        """
        with of_file(self._path):
            self._cut()
            self._torn = os.fstat(self._fd).st_size
            if os.write(self._fd, raw) != len(raw):
                self._cut()
                raise _disk_full()
            self._torn = None

    def _cut(self) -> None:
        if self._torn is not None:
            os.ftruncate(self._fd, self._torn)
            self._torn = None

    def close(self) -> None:
        """Makes the file durable and closes it.

        Raises:
            OSError: It may not be durable; it is closed.
        """
        with of_file(self._path):
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one record to a file that several processes write to.

    Raises:
        OSError: It cannot be written completely; readers ignore the part that was written.
    """
    with of_file(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
        try:
            before = os.fstat(fd).st_size
            # With several writers a torn end cannot be cut off: a newline closes it, and readers skip it.
            torn = before > 0 and os.pread(fd, 1, before - 1) != b"\n"
            raw = (b"\n" if torn else b"") + encode(record)
            if os.write(fd, raw) != len(raw):
                raise _disk_full()
        finally:
            os.close(fd)
