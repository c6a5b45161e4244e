"""A stream of bytes as blocks that end where a record ends."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.data.read.decompress import DamagedArchiveError, Stream

BLOCK_BYTES = 4 << 20
# How far past the end of its range a reader looks at once for the end of the last record.
_PAST_THE_END = 1 << 16


@dataclass(frozen=True)
class Block:
    """Bytes from `offset` on.

    Attributes:
        offset: Place in the decompressed content.
        content: Whole records, each with its separator behind it (the last of the file may have none);
            or a part of one record that is too long.
        too_long: Whether it is such a part, and which.
    """

    offset: int
    content: bytes
    too_long: Literal["", "begins", "goes on"] = ""


@dataclass(frozen=True)
class Cut:
    """A record begins at `offset`, at or after the place where a cut was wanted."""

    offset: int


@dataclass(frozen=True)
class Damage:
    """The archive cannot be read from `offset` on; an unfinished record before it is given up.

    Attributes:
        offset: Place in the decompressed content.
        reason: What is wrong.
        lost: Bytes of the file that cannot be trusted.
    """

    offset: int
    reason: str
    lost: int


def can_overlap(separator: bytes) -> bool:
    """Whether two occurrences can share bytes, as those of a blank line can.

    Where records begin then depends on everything before, so that a file cannot be entered in its middle.
    """
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def first_record(stream: Stream, separator: bytes, start: int) -> int | None:
    """The place of the first record that begins at or after `start`; None if there is none."""
    offset = max(0, start - len(separator))
    if start == 0:
        return 0
    stream.move_to(offset)
    window = b""
    while piece := stream.read(_PAST_THE_END):
        window += piece
        found = window.find(separator)
        if found >= 0:
            return offset + found + len(separator)
        keep = len(separator) - 1
        offset += len(window) - keep
        window = window[len(window) - keep :]
    return None


def record_blocks(
    stream: Stream, separator: bytes, offset: int, longest: int, step: int | None = None
) -> Iterator[Block | Cut | Damage]:
    """Reads on from a record's beginning to the end of the stream.

    Args:
        stream: Stands at `offset`.
        separator: Ends a record.
        offset: Where a record begins.
        longest: Bytes of the longest record, with its separator, that is kept in memory; shorter ones than a block are
            kept all the same.
        step: A cut is wanted at every multiple of it.
    """
    longest = max(longest, BLOCK_BYTES)
    target = _next_multiple(offset, step)
    pending = ready = b""
    while True:
        try:
            piece = ready or stream.read(_read_size(offset, len(pending), target))
        except DamagedArchiveError as error:
            yield Damage(offset + len(pending), str(error), error.lost)
            return
        ready = b""
        if not piece:
            if pending:
                yield Block(offset, pending)
            return
        if target is not None and offset + len(pending) + len(piece) >= target:
            data = pending + piece
            while target is not None and offset + len(data) >= target:
                end = _end_at_or_after(data, separator, target - offset)
                if end is None:
                    break
                yield from _judged(offset, data[:end], separator, longest)
                offset, data = offset + end, data[end:]
                yield Cut(offset)
                target = _next_multiple(offset, step)
            pending, piece = b"", data
        whole, pending = _parted(pending, piece, separator)
        if whole:
            yield from _judged(offset, whole, separator, longest)
            offset += len(whole)
        if len(pending) > longest:
            behind = yield from _long_record(stream, separator, offset, pending)
            if behind is None:
                return
            (offset, ready), pending = behind, b""
            if target is not None and offset >= target:
                yield Cut(offset)
                target = _next_multiple(offset, step)


def _judged(offset: int, data: bytes, separator: bytes, longest: int) -> Iterator[Block]:
    """Whole records as a block, with the first in one of its own if it is too long.

    No other one can be: it lies in what was read last, which is no longer than a block. Without this it would depend on
    where reading began, thus on interruptions, whether such a record is seen whole or in parts.
    """
    if len(data) > longest:
        end = _end_at_or_after(data, separator, 0)
        if end is not None and end > longest:
            yield Block(offset, data[:end], "begins")
            offset, data = offset + end, data[end:]
    if data:
        yield Block(offset, data)


def _long_record(
    stream: Stream, separator: bytes, offset: int, data: bytes
) -> Generator[Block | Damage, None, tuple[int, bytes] | None]:
    """Yields a record that is too long in parts; returns where it ends and what was read behind it."""
    kind: Literal["begins", "goes on"] = "begins"
    while (end := data.find(separator)) < 0:
        # The end may have the first bytes of a separator.
        done = len(data) - len(separator) + 1
        yield Block(offset, data[:done], kind)
        offset, data, kind = offset + done, data[done:], "goes on"
        try:
            piece = stream.read(BLOCK_BYTES)
        except DamagedArchiveError as error:
            yield Damage(offset + len(data), str(error), error.lost)
            return None
        if not piece:
            if data:
                yield Block(offset, data, kind)
            return None
        data += piece
    end += len(separator)
    yield Block(offset, data[:end], kind)
    return offset + end, data[end:]


def _next_multiple(offset: int, step: int | None) -> int | None:
    return None if step is None else (offset // step + 1) * step


def _read_size(offset: int, pending: int, target: int | None) -> int:
    if target is None:
        return BLOCK_BYTES
    # At least as much again as is pending, or a long record would be copied once for every little piece of it.
    return min(BLOCK_BYTES, max(target - offset - pending, 0) + max(_PAST_THE_END, pending))


def _end_at_or_after(data: bytes, separator: bytes, place: int) -> int | None:
    """The end of the first separator that ends at or after `place`."""
    if can_overlap(separator):
        return next((m.end() for m in re.finditer(re.escape(separator), data) if m.end() >= place), None)
    found = data.find(separator, max(0, place - len(separator)))
    return None if found < 0 else found + len(separator)


def _parted(pending: bytes, piece: bytes, separator: bytes) -> tuple[bytes, bytes]:
    """`pending + piece` up to the end of its last separator, and the rest; every byte is copied once."""
    end = 0 if can_overlap(separator) else _last_end(piece, separator)
    if end:
        return b"".join((pending, memoryview(piece)[:end])), piece[end:]
    data = pending + piece
    end = _last_end(data, separator)
    return data[:end], data[end:]


def _last_end(data: bytes, separator: bytes) -> int:
    """The end of the last separator, 0 if there is none."""
    if can_overlap(separator):
        return max((m.end() for m in re.finditer(re.escape(separator), data)), default=0)
    found = data.rfind(separator)
    return found + len(separator) if found >= 0 else 0
