"""Reads a stream of bytes in blocks that end where a record ends."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.data.read.decompress import DamagedArchiveError, Stream

BLOCK_BYTES = 4 << 20
# How far a reader reads past the end of its range at once to find the end of the last record.
_PAST_THE_END = 1 << 16


@dataclass(frozen=True)
class Block:
    """Whole records, or a part of one record that is too long."""

    offset: int
    """First byte, counted in the decompressed content."""
    content: bytes
    """The records, each with its separator behind it; the last of the file may have none."""
    too_long: Literal["", "begins", "continues"] = ""
    """Whether it is a part of a record that is too long, and which."""


@dataclass(frozen=True)
class Cut:
    """A place between two records, at or after the offset where a cut was wanted."""

    offset: int
    """Where the second record begins."""


@dataclass(frozen=True)
class Damage:
    """The end of what can be read of an archive; an unfinished record before it is dropped."""

    offset: int
    """Where the damage begins, counted in the decompressed content."""
    reason: str
    """What is wrong."""
    lost: int
    """Bytes of the file that cannot be trusted."""


def can_overlap(separator: bytes) -> bool:
    """Returns whether two occurrences can share bytes, as two blank lines can.

    Where records begin then depends on everything before them, so that reading cannot start inside a file.
    """
    return any(separator.startswith(separator[i:]) for i in range(1, len(separator)))


def first_record(stream: Stream, separator: bytes, start: int) -> int | None:
    """Returns the offset of the first record that begins at or after `start`; None if there is none."""
    if start == 0:
        return 0
    offset = max(0, start - len(separator))
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
    """Yields the blocks from a record's beginning to the end of the stream, and the cuts between them.

    Args:
        stream: The content, positioned at `offset`.
        separator: Ends a record.
        offset: Where a record begins.
        longest: Bytes of the longest record, with its separator, that is kept in memory; records shorter than a block
            always are.
        step: A cut is wanted at every multiple of this offset.
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
                yield from _without_long_record(offset, data[:end], separator, longest)
                offset, data = offset + end, data[end:]
                yield Cut(offset)
                target = _next_multiple(offset, step)
            pending, piece = b"", data
        whole, pending = _split_pending(pending, piece, separator)
        if whole:
            yield from _without_long_record(offset, whole, separator, longest)
            offset += len(whole)
        if len(pending) > longest:
            behind = yield from _long_record(stream, separator, offset, pending)
            if behind is None:
                return
            (offset, ready), pending = behind, b""
            if target is not None and offset >= target:
                yield Cut(offset)
                target = _next_multiple(offset, step)


def _without_long_record(offset: int, data: bytes, separator: bytes, longest: int) -> Iterator[Block]:
    """Yields whole records as one block, the first in a block of its own if it is too long.

    No other record can be too long: it is in the last read, which is no longer than a block. Without this, whether such
    a record is seen whole or in parts would depend on where reading began, and thus on interruptions.
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
    """Yields a record that is too long in parts; returns where it ends and the bytes read behind it."""
    kind: Literal["begins", "continues"] = "begins"
    while (end := data.find(separator)) < 0:
        # The last bytes may be the first of a separator.
        done = len(data) - len(separator) + 1
        yield Block(offset, data[:done], kind)
        offset, data, kind = offset + done, data[done:], "continues"
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
    # At least as much again as is pending, or a long record would be copied once for every small piece of it.
    return min(BLOCK_BYTES, max(target - offset - pending, 0) + max(_PAST_THE_END, pending))


def _end_at_or_after(data: bytes, separator: bytes, place: int) -> int | None:
    """Returns the end of the first separator that ends at or after `place`; None if there is none."""
    if can_overlap(separator):
        return next((m.end() for m in re.finditer(re.escape(separator), data) if m.end() >= place), None)
    found = data.find(separator, max(0, place - len(separator)))
    return None if found < 0 else found + len(separator)


def _split_pending(pending: bytes, piece: bytes, separator: bytes) -> tuple[bytes, bytes]:
    """Splits `pending + piece` at the end of its last separator; every byte is copied once."""
    end = 0 if can_overlap(separator) else _last_end(piece, separator)
    if end:
        return b"".join((pending, memoryview(piece)[:end])), piece[end:]
    data = pending + piece
    end = _last_end(data, separator)
    return data[:end], data[end:]


def _last_end(data: bytes, separator: bytes) -> int:
    """Returns the end of the last separator; 0 if there is none."""
    if can_overlap(separator):
        return max((m.end() for m in re.finditer(re.escape(separator), data)), default=0)
    found = data.rfind(separator)
    return found + len(separator) if found >= 0 else 0
