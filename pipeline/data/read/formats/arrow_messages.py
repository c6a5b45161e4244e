"""The messages of an Arrow file, from their headers: where each record batch is, and whether it is compressed.

An IPC stream is a row of messages: a length, a header (a table of FlatBuffers), a body. An IPC file is such a stream
between its magic bytes and a footer. https://arrow.apache.org/docs/format/Columnar.html (IPC),
https://flatbuffers.dev/internals (vtables).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_MAGIC = b"ARROW1\0\0"
_CONTINUES = 0xFFFFFFFF
_LARGEST_HEADER = 64 << 20
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
# Fields of the tables Message, RecordBatch and DictionaryBatch.
_HEADER_TYPE, _HEADER, _BODY_LENGTH, _COMPRESSION, _DATA = 1, 2, 3, 3, 1


@dataclass(frozen=True)
class Batch:
    """One record batch."""

    stop: int
    """The byte after it."""
    body_bytes: int
    """Bytes of its columns."""


def stream_start(content: memoryview) -> int:
    """Returns where the stream begins: behind the magic bytes of an IPC file, or at once."""
    return len(_MAGIC) if bytes(content[: len(_MAGIC)]) == _MAGIC else 0


def record_batches(content: memoryview) -> Iterator[Batch]:
    """Yields the record batches of a stream or a file.

    Raises:
        ValueError: A message is damaged, ends behind the end of the file, or has a compressed body, whose size in
            memory is not known before it is unpacked.
    """
    place = stream_start(content)
    while place + 4 <= len(content):
        start, length = place + 4, _number(content, place, "<I")
        if length == _CONTINUES:
            start, length = place + 8, _number(content, place + 4, "<I")
        if length == 0:
            return
        if length > _LARGEST_HEADER or start + length > len(content):
            raise ValueError("the header of a message ends behind the end of the file")
        kind, body_bytes = _message(content[start : start + length])
        place = start + length + body_bytes
        if place > len(content):
            raise ValueError("a message ends behind the end of the file")
        if kind == _BATCH:
            yield Batch(place, body_bytes)


def _message(header: memoryview) -> tuple[int, int]:
    """Returns the type of a message and the length of its body."""
    message = _number(header, 0, "<I")
    kind = _field(header, message, _HEADER_TYPE, "<B")
    body_bytes = _field(header, message, _BODY_LENGTH, "<q")
    if kind not in (_SCHEMA, _DICTIONARY, _BATCH) or body_bytes < 0:
        raise ValueError("the header of a message is damaged")
    inner = _table(header, message, _HEADER)
    batch = _table(header, inner, _DATA) if kind == _DICTIONARY else inner
    if kind != _SCHEMA and _offset(header, batch, _COMPRESSION):
        raise ValueError("its columns are compressed; write them without compression, or as Parquet")
    return kind, body_bytes


def _field(header: memoryview, table: int, index: int, form: str) -> int:
    """Returns a number of a table; 0 if it is not stored."""
    offset = _offset(header, table, index)
    return _number(header, table + offset, form) if offset else 0


def _table(header: memoryview, table: int, index: int) -> int:
    """Returns the place of a table inside a table."""
    offset = _offset(header, table, index)
    if not offset:
        raise ValueError("the header of a message is damaged")
    return table + offset + _number(header, table + offset, "<I")


def _offset(header: memoryview, table: int, index: int) -> int:
    """Returns where in a table a field is; 0 if it is not stored."""
    vtable = table - _number(header, table, "<i")
    slot = 4 + 2 * index
    return _number(header, vtable + slot, "<H") if slot < _number(header, vtable, "<H") else 0


def _number(content: memoryview, place: int, form: str) -> int:
    if not 0 <= place <= len(content) - struct.calcsize(form):
        raise ValueError("the header of a message is damaged")
    return int(struct.unpack_from(form, content, place)[0])
