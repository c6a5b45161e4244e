"""Blocks of records to documents: a text between separators, a line of JSON."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.data.read import bad_records
from pipeline.data.read.chunks import Gatherer, Place
from pipeline.data.read.documents import Documents

# The size of a block is a 32-bit number in Arrow.
_ARROW_BYTES = (1 << 31) - 1
_EXACT_DIGITS = 40
_NEWLINE, _RETURN, _OPEN, _CLOSE = b"\n\r{}"


def add_texts(block: bytes, separator: bytes, gatherer: Gatherer, place: Place) -> None:
    """Takes documents that are separated by `separator`; what follows the last one is a document if it is not empty."""
    ends = np.fromiter(_places(block, separator), np.int64)
    # One copy of the text for all documents, instead of one for each and another to join them.
    data = np.frombuffer(block.replace(separator, b""), np.uint8)
    bounds = np.concatenate(([0], ends - np.arange(len(ends)) * len(separator)))
    offsets = bounds if bounds[-1] == len(data) else np.append(bounds, len(data))
    gatherer.add(
        Documents(data, offsets), lambda index, byte: place(int(offsets[index]) + index * len(separator) + byte)
    )


def _places(block: bytes, separator: bytes) -> Iterator[int]:
    found = block.find(separator)
    while found >= 0:
        yield found
        found = block.find(separator, found + len(separator))


def add_json_lines(block: bytes, field: str, gatherer: Gatherer, place: Place) -> None:
    """Takes the text field of every line; lines of white space are no records."""
    documents = _fast_json(block, field)
    if documents is not None:
        gatherer.add(documents, lambda index, byte: place(_line_start(block, index)))
        return
    # Something is wrong with a line, or unusual: look at each.
    texts: list[bytes] = []
    starts: list[int] = []
    start = 0
    for line in block.split(b"\n"):
        if line.strip():
            text = _slow_json(line, field, gatherer, functools.partial(_moved, place, start))
            if text is not None:
                texts.append(text)
                starts.append(start)
        start += len(line) + 1
    gatherer.add(Documents.of(texts), lambda index, byte: place(starts[index]))


def _fast_json(block: bytes, field: str) -> Documents | None:
    """All lines at once by Arrow; None unless every line is an object with this field, a string."""
    import pyarrow
    import pyarrow.json

    lines = _lines_of_objects(block)
    if lines is None or len(block) >= _ARROW_BYTES:
        return None
    if not Documents(np.frombuffer(block, np.uint8), np.array([0, len(block)])).is_utf8():
        return None
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(
                explicit_schema=pyarrow.schema([(field, pyarrow.string())]), unexpected_field_behavior="ignore"
            ),
        )
    except (pyarrow.ArrowInvalid, UnicodeDecodeError):
        return None
    column = table.column(field)
    # More rows than lines: several objects in one.
    if column.num_chunks != 1 or column.null_count or len(column) != lines:
        return None
    return from_arrow(column.chunk(0))


def _lines_of_objects(block: bytes) -> int | None:
    """How many lines there are; None unless each begins with `{` and ends with `}`.

    Then no object goes on in the next line, as none has `}{` in it. Arrow takes no notice of line ends: without this,
    an object over two lines makes up for two objects in one line.
    """
    data = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    if not block.endswith(b"\n"):
        ends = np.append(ends, len(data))
    last = data[ends - 1]
    if (last == _RETURN).any():
        last = np.where(last == _RETURN, data[ends - 2], last)
    first = data[np.concatenate(([0], ends[:-1] + 1))]
    return len(ends) if (first == _OPEN).all() and (last == _CLOSE).all() else None


def _integer(digits: str) -> int | float:
    """An integer of JSON, which may have more digits than the 4,300 that Python converts: Arrow takes it."""
    return int(digits) if len(digits) <= _EXACT_DIGITS else float(digits)


def _slow_json(line: bytes, field: str, gatherer: Gatherer, place: Place) -> bytes | None:
    try:
        record = json.loads(line.decode(), parse_int=_integer)
    except UnicodeDecodeError as error:
        gatherer.report(bad_records.INVALID_UTF8, place(error.start), error.reason)
        return None
    except json.JSONDecodeError as error:
        gatherer.report(bad_records.INVALID_JSON, place(len(line.decode()[: error.pos].encode())), error.msg)
        return None
    except RecursionError:
        gatherer.report(bad_records.INVALID_JSON, place(0), "nested too deeply")
        return None
    problem = _field_problem(record, field)
    if problem is not None:
        gatherer.report(problem[0], place(0), problem[1])
        return None
    try:
        return bytes(record[field].encode())
    except UnicodeEncodeError:
        gatherer.report(bad_records.INVALID_UTF8, place(0), f"{field!r} has half of a surrogate pair")
        return None


def _field_problem(record: Any, field: str) -> tuple[str, str] | None:
    if not isinstance(record, dict):
        return bad_records.MISSING_FIELD, f"the line is no JSON object, so it has no {field!r}"
    if field not in record:
        names = ", ".join(map(repr, list(record)[:8]))
        return bad_records.MISSING_FIELD, f"{field!r}; the record has {names or 'no field'}: set `field` of the source"
    if not isinstance(record[field], str):
        return bad_records.NOT_A_STRING, f"{field!r} is {json.dumps(record[field])[:40]}"
    return None


def from_arrow(column: Any) -> Documents:
    """The values of an Arrow string or binary array without nulls, not copied."""
    import pyarrow

    if column.type not in (pyarrow.large_string(), pyarrow.large_binary()):
        column = column.cast(pyarrow.large_binary())
    _, offsets, data = column.buffers()
    if len(column) == 0 or offsets is None:
        return Documents.of([])
    bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return Documents(np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8), bounds)


def _moved(place: Place, start: int, byte: int) -> Callable[[], str]:
    return place(start + byte)


def _line_start(block: bytes, index: int) -> int:
    start = 0
    for _ in range(index):
        start = block.index(b"\n", start) + 1
    return start
