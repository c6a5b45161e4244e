"""Files of records that a separator ends: what text and JSON lines have in common."""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from pipeline.data.read import bad_records
from pipeline.data.read.chunks import ChunkBuilder, Place, ReadItems
from pipeline.data.read.decompress import DamagedArchiveError, Stream, open_stream
from pipeline.data.read.record_blocks import BLOCK_BYTES, Cut, Damage, can_overlap, first_record, record_blocks
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import FileSpan, Part, TaskFile


class RecordFormat(abc.ABC):
    """Divides files at records and reads them block by block; subclasses turn a block into documents."""

    def __init__(self, separator: bytes) -> None:
        self._separator = separator

    @abc.abstractmethod
    def _longest_record(self, limit: int) -> int:
        """Returns the bytes beyond which a record cannot hold a document of `limit` bytes or fewer."""

    @abc.abstractmethod
    def _add(self, block: bytes, builder: ChunkBuilder, place: Place) -> None:
        """Adds the documents of a block of whole records."""

    def split(self, file: SourceFile, slice_bytes: int) -> list[Part]:
        """Returns ranges of bytes, or one stream where the file can only be read from its start."""
        if file.compression or can_overlap(self._separator):
            return [Part("stream")]
        return [Part("range", start, start + slice_bytes) for start in range(0, file.size, slice_bytes)]

    def read(self, wanted: TaskFile, builder: ChunkBuilder) -> ReadItems:
        """Yields the records of a file, cut into slices where the task wants several; of a range, only its records."""
        file, (kind, start, stop) = wanted.file, wanted.part
        longest = self._longest_record(builder.limit)
        with open_stream(file.path, file.compression) as stream:
            begin = self._enter(stream, wanted.part)
            if begin is None or (kind == "range" and begin >= stop):
                yield wanted.span(start, start, hashlib.sha256().hexdigest())
                return
            digest, offset, end, lost = hashlib.sha256(), begin, begin, 0
            position = stream.position
            for item in record_blocks(stream, self._separator, begin, longest, wanted.slice_bytes):
                builder.bytes_read += stream.position - position
                position = stream.position
                if isinstance(item, Cut):
                    yield builder.take()
                    if kind == "range":
                        yield wanted.span(offset, item.offset, digest.hexdigest())
                        return
                    yield FileSpan(wanted.number, offset, item.offset, digest.hexdigest(), last=False)
                    digest, offset = hashlib.sha256(), item.offset
                elif isinstance(item, Damage):
                    lost = item.lost
                    builder.report(bad_records.TRUNCATED, byte_place(file, item.offset), item.reason)
                else:
                    digest.update(item.content)
                    end = item.offset + len(item.content)
                    if item.too_long == "begins":
                        builder.report_too_long(record_place(file, item.offset))
                    elif not item.too_long:
                        self._add(item.content, builder, _places_from(file, item.offset))
                    if builder.is_full:
                        yield builder.take()
            if wanted.slice_bytes is not None:
                yield builder.take()
            yield wanted.span(offset, end, digest.hexdigest(), lost)

    def _enter(self, stream: Stream, part: Part) -> int | None:
        """Moves to the first record of a part and returns its offset; None if no record begins there."""
        begin = first_record(stream, self._separator, part.start) if part.kind == "range" else part.start
        if begin is not None:
            stream.move_to(begin)
        return begin


def byte_place(file: SourceFile, byte: int) -> Callable[[], str]:
    """Describes where a byte of the content is; reads the file up to there, but only for an error message."""
    return functools.partial(_line_and_byte, file, byte)


def record_place(file: SourceFile, byte: int) -> Callable[[], str]:
    """Describes where a bad record is and whether its archive is damaged: garbled text precedes a wrong checksum."""
    return functools.partial(_line_and_damage, file, byte)


def _places_from(file: SourceFile, offset: int) -> Place:
    return lambda byte: record_place(file, offset + byte)


def _line_and_byte(file: SourceFile, byte: int) -> str:
    line, left = 1, byte
    with open_stream(file.path, file.compression) as stream:
        while left > 0 and (piece := stream.read(min(left, BLOCK_BYTES))):
            line += piece.count(b"\n")
            left -= len(piece)
    where = f" of the decompressed content of {Path(file.path).name}" if file.compression else ""
    return f"line {line}, byte {byte}{where}"


def _line_and_damage(file: SourceFile, byte: int) -> str:
    place = _line_and_byte(file, byte)
    if file.compression is not None:
        with open_stream(file.path, file.compression) as stream:
            try:
                while stream.read(BLOCK_BYTES):
                    pass
            except DamagedArchiveError as error:
                return f"{place}, a {bad_records.TRUNCATED} ({error})"
    return place
