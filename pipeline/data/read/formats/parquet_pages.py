"""The sizes of a column's pages, read from the headers before the pages: Arrow would unpack whatever they hold.

A header is a struct of Thrift's compact protocol: https://github.com/apache/parquet-format (`PageHeader`),
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Statistics make headers longer; most have some dozen bytes.
_USUAL_HEADER, _LONGEST_HEADER = 1 << 10, 1 << 20

_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


def page_sizes(source: Any, column: Any) -> Iterator[int]:
    """Yields the bytes of each page of a column before compression.

    Args:
        source: The file, opened by Arrow.
        column: What the footer says of the column in one row group.

    Raises:
        ValueError: A header is damaged.
    """
    place = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        place = min(place, column.dictionary_page_offset)
    end = place + column.total_compressed_size
    while place < end:
        header, fields = _page_header(source, place)
        unpacked, packed = fields.get(2, -1), fields.get(3, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError("the header of a page is damaged")
        yield unpacked
        place += header + packed


def _page_header(source: Any, place: int) -> tuple[int, dict[int, int]]:
    """Returns the length of a header and its numbers by field."""
    for most in (_USUAL_HEADER, _LONGEST_HEADER):
        source.seek(place)
        reader = _Reader(source.read(most))
        try:
            fields = reader.struct()
            return reader.place, fields
        except (IndexError, RecursionError):
            continue
    raise ValueError("the header of a page is damaged")


class _Reader:
    def __init__(self, content: bytes) -> None:
        self._content = content
        self.place = 0

    def struct(self) -> dict[int, int]:
        """Reads a struct and returns its numbers by field."""
        numbers, field = {}, 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._number()
            if head & 15 in _INTEGERS:
                numbers[field] = self._number()
            else:
                self._skip(head & 15)
        return numbers

    def _skip(self, kind: int, *, in_list: bool = False) -> None:
        if kind in _BOOLEANS:
            self.place += in_list  # the value of a field is its type
        elif kind == _BYTE:
            self.place += 1
        elif kind in _INTEGERS:
            self._varint()
        elif kind == _DOUBLE:
            self.place += 8
        elif kind == _BINARY:
            length = self._varint()
            self.place += length
        elif kind in _LISTS:
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._skip(head & 15, in_list=True)
                self._check()
        elif kind == _STRUCT:
            self.struct()
        else:  # a map; no header of a page has one
            raise IndexError

    def _byte(self) -> int:
        self.place += 1
        return self._content[self.place - 1]

    def _check(self) -> None:
        if self.place > len(self._content):
            raise IndexError

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise IndexError
