"""JSON lines: one object per line, whose text field is the document."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read import bad_records
from pipeline.data.read.chunks import ChunkBuilder, Place
from pipeline.data.read.documents import Documents, Flags
from pipeline.data.read.fields import Filter, WrongKindError, find_column, find_field, json_schema
from pipeline.data.read.formats.records import RecordFormat

# A byte of text takes up to six in JSON (`\u0000`), and a line may have other fields: `max_document_mb` limits the text
# alone, whose length only the whole line tells. A line beyond these bounds is too long whatever is in it.
_ESCAPE_BYTES = 6
_OTHER_FIELDS_BYTES = 1 << 20
# Arrow holds the size of a block in a 32-bit number.
_ARROW_BYTES = (1 << 31) - 1
_EXACT_DIGITS = 40
_NEWLINE, _RETURN, _OPEN, _CLOSE = b"\n\r{}"


class JsonLines(RecordFormat):
    """Lines of JSON; lines of white space are no records."""

    def __init__(self, source: SourceConfig) -> None:
        super().__init__(b"\n")
        self._field = source.field
        self._filter = Filter(source)

    def _longest_record(self, limit: int) -> int:
        return _ESCAPE_BYTES * limit + _OTHER_FIELDS_BYTES

    def _add(self, block: bytes, builder: ChunkBuilder, place: Place) -> None:
        parsed = _parse_block(block, self._field, self._filter)
        if parsed is not None:
            documents, lines = parsed
            builder.drop(len(lines) - len(documents))
            kept = np.flatnonzero(lines)
            builder.add(documents, lambda index, byte: place(_line_start(block, int(kept[index]))))
            return
        # A line is wrong or unusual.
        texts: list[bytes] = []
        starts: list[int] = []
        start = 0
        for line in block.split(b"\n"):
            if line.strip():
                text = self._parse_line(line, builder, functools.partial(_shifted, place, start))
                if text is not None:
                    texts.append(text)
                    starts.append(start)
            start += len(line) + 1
        builder.add(Documents.of(texts), lambda index, byte: place(starts[index]))

    def _parse_line(self, line: bytes, builder: ChunkBuilder, place: Place) -> bytes | None:
        """Returns the text of one line; None if it is dropped, or if something is wrong with it, which is reported."""
        try:
            record = json.loads(line.decode(), parse_int=_integer)
            if isinstance(record, dict) and not self._filter.keeps(record):
                builder.drop(1)
                return None
        except UnicodeDecodeError as error:
            builder.report(bad_records.INVALID_UTF8, place(error.start), error.reason)
            return None
        except json.JSONDecodeError as error:
            return self._parse_as_block(line, builder, place(len(line.decode()[: error.pos].encode())), error.msg)
        except RecursionError:
            return self._parse_as_block(line, builder, place(0), "nested too deeply")
        except WrongKindError as error:
            builder.report(bad_records.NOT_COMPARABLE, place(0), str(error))
            return None
        problem = _field_problem(record, self._field)
        if problem is not None:
            builder.report(problem[0], place(0), problem[1])
            return None
        try:
            return bytes(find_field(record, self._field).encode())
        except UnicodeEncodeError:
            builder.report(bad_records.INVALID_UTF8, place(0), f"{self._field!r} has half of a surrogate pair")
            return None

    def _parse_as_block(
        self, line: bytes, builder: ChunkBuilder, place: Callable[[], str], detail: str
    ) -> bytes | None:
        """Returns the text of a line that Python refuses; None as `_parse_line`.

        In other fields Arrow takes `Inf`, `-NaN` and any depth; a line must not be bad for another one of its block.
        """
        parsed = _parse_block(line, self._field, self._filter)
        if parsed is None:
            builder.report(bad_records.INVALID_JSON, place, detail)
            return None
        documents, kept = parsed
        builder.drop(len(kept) - len(documents))
        return documents[0] if len(documents) else None


def _parse_block(block: bytes, field: str, wanted: Filter) -> tuple[Documents, Flags] | None:
    """Parses all lines at once with Arrow; None unless every line is an object whose fields are as they should be.

    Returns:
        The texts of the lines that are kept, and which lines those are.
    """
    import pyarrow
    import pyarrow.json

    lines = _count_object_lines(block)
    if lines is None or len(block) >= _ARROW_BYTES:
        return None
    if not Documents(np.frombuffer(block, np.uint8), np.array([0, len(block)])).is_utf8():
        return None
    schema = json_schema({**wanted.fields, field: "text"})
    if schema is None or wanted.fields.get(field, "text") != "text":
        return None
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(block),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pyarrow.ArrowInvalid, UnicodeDecodeError):
        return None
    # More rows than lines: several objects in one.
    if len(table) != lines or len(table.column(0).chunks) != 1:
        return None
    column = functools.partial(_column, table)
    texts = find_column(column, field)
    kept = np.ones(lines, np.bool_)
    if wanted:
        kept = wanted.kept({name: find_column(column, name) for name in wanted.fields})
        texts = texts if kept.all() else texts.filter(pyarrow.array(kept))
    return None if texts.null_count else (Documents.from_arrow(texts), kept)


def _column(table: Any, name: str) -> Any:
    return table.column(name).chunk(0) if name in table.column_names else None


def _count_object_lines(block: bytes) -> int | None:
    """Returns the number of lines; None unless each begins with `{` and ends with `}`.

    Then no object continues on the next line, since none has `}{` in it. Arrow ignores line ends: without this check,
    an object over two lines makes up for two objects on one line.
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
    """Converts a JSON integer of any length: Arrow accepts more than the 4,300 digits that Python converts exactly."""
    return int(digits) if len(digits) <= _EXACT_DIGITS else float(digits)


def _field_problem(record: Any, field: str) -> tuple[str, str] | None:
    """Returns the reason and the detail, or None if the field is a string."""
    if not isinstance(record, dict):
        return bad_records.MISSING_FIELD, f"the line is not a JSON object, so it has no {field!r}"
    value = find_field(record, field)
    if value is None and field not in record:
        names = ", ".join(map(repr, list(record)[:8]))
        return bad_records.MISSING_FIELD, f"{field!r}; the record has {names or 'no field'}: set `field` of the source"
    if not isinstance(value, str):
        return bad_records.NOT_A_STRING, f"{field!r} is {json.dumps(value)[:40]}"
    return None


def _shifted(place: Place, start: int, byte: int) -> Callable[[], str]:
    return place(start + byte)


def _line_start(block: bytes, index: int) -> int:
    start = 0
    for _ in range(index):
        start = block.index(b"\n", start) + 1
    return start
