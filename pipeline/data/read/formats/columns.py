"""Columns of text as Arrow hands them over: what Parquet and Arrow files have in common."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pipeline.config.data_sections import SourceConfig
from pipeline.config.where import Kind
from pipeline.data.read import bad_records
from pipeline.data.read.chunks import CHUNK_BYTES, Chunk, ChunkBuilder
from pipeline.data.read.decompress import DamagedArchiveError, open_stream
from pipeline.data.read.documents import Documents, Flags
from pipeline.data.read.fields import Filter, find_column
from pipeline.data.read.sources import SourceFile
from pipeline.errors import DataError

FIRST_ROWS, _MOST_ROWS = 1 << 6, 1 << 16


class Digest:
    """Digest of texts and their rows that does not depend on how many of them come at once."""

    def __init__(self) -> None:
        self._shape, self._text = hashlib.sha256(), hashlib.sha256()

    def update(self, rows: npt.NDArray[np.int64], documents: Documents) -> None:
        """Adds texts and the rows that hold them."""
        self._shape.update(np.stack([rows, documents.lengths], axis=1).astype("<i8").tobytes())
        self._text.update(documents.data[documents.offsets[0] : documents.offsets[-1]].data)

    def hexdigest(self) -> str:
        """Returns the digest so far."""
        return hashlib.sha256(self._shape.digest() + self._text.digest()).hexdigest()


class TextColumn:
    """The texts of a source in batches of rows, without the rows that its condition drops."""

    def __init__(self, source: SourceConfig) -> None:
        self._field = source.field
        self._filter = Filter(source)
        self.names = list(dict.fromkeys((source.field, *self._filter.fields)))
        """The fields that must be read, the text's first."""

    def problem(self, schema: Any) -> tuple[str, str] | None:
        """Returns the reason and the detail of what is wrong with the columns of a file; None if it can be read."""
        problem = _column_problem(schema, self._field, None, "field")
        for name, kind in self._filter.fields.items():
            problem = problem or _column_problem(schema, name, kind, "where")
        return problem

    def read(self, batch: Any, first_row: int, builder: ChunkBuilder, digest: Digest) -> Generator[Chunk, None, int]:
        """Adds the texts of a batch and yields chunks; returns the bytes of all its texts."""
        column = columns_of(batch)
        kept = None
        if self._filter:
            fields = self._filter.fields.items()
            kept = self._filter.kept({name: _comparable(find_column(column, name), kind) for name, kind in fields})
        texts = _strings(find_column(column, self._field))
        size = max(1, CHUNK_BYTES * len(texts) // max(1, texts.nbytes))  # few rows at a time if they turned out long
        for start in range(0, len(texts), size):
            flags = None if kept is None else kept[start : start + size]
            self._add(texts.slice(start, size), flags, first_row + start, builder, digest)
            if builder.is_full:
                yield builder.take()
        return int(texts.nbytes)

    def _add(self, texts: Any, kept: Flags | None, first_row: int, builder: ChunkBuilder, digest: Digest) -> None:
        import pyarrow

        rows = first_row + np.arange(len(texts))
        if kept is not None and not kept.all():
            builder.drop(int(np.count_nonzero(~kept)))
            texts, rows = texts.filter(pyarrow.array(kept)), rows[kept]
        if texts.null_count:
            for row in rows[texts.is_null().to_numpy(zero_copy_only=False)].tolist():
                builder.report(bad_records.MISSING_FIELD, row_place(row), f"{self._field!r} is null")
            rows = rows[texts.is_valid().to_numpy(zero_copy_only=False)]
            texts = texts.drop_null()
        documents = Documents.from_arrow(texts)
        digest.update(rows, documents)
        builder.add(documents, lambda index, byte: row_place(int(rows[index]), byte))


def columns_of(batch: Any) -> Callable[[str], Any]:
    """Returns what gives a column of a batch by its name, or None."""
    names = batch.schema.names
    return lambda name: batch.column(names.index(name)) if name in names else None


def more_rows(rows: int, row_bytes: int) -> int:
    """Returns how many rows to ask for next: twice as many, unless they would make more than a chunk."""
    return max(1, min(2 * rows, _MOST_ROWS, CHUNK_BYTES // max(1, row_bytes)))


def row_place(row: int, byte: int | None = None) -> Callable[[], str]:
    """Describes where a row is."""
    within = "" if byte is None else f", byte {byte} of the text"
    return lambda: f"row {row} (from 0){within}"


@contextlib.contextmanager
def unpacked(file: SourceFile) -> Iterator[BinaryIO]:
    """Yields a temporary file with the content of an archive, for formats that are not read in order."""
    with tempfile.TemporaryFile() as place, open_stream(file.path, file.compression) as stream:
        while piece := stream.read(1 << 20):
            place.write(piece)
        place.seek(0)
        yield place


def unreadable() -> tuple[type[Exception], ...]:
    """Returns the errors that a damaged file raises; ValueError, for example, if names in its footer are not UTF-8."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, DamagedArchiveError


def raise_system_error(error: Exception, place: str) -> None:
    """Raises errors of disk and memory, which are not damage; Arrow's own OSErrors, about damage, have no number."""
    if isinstance(error, MemoryError):
        raise DataError(
            f"{place}: takes more memory than there is ({first_line(error)}); "
            "prepare it with more, write it with smaller row groups, or leave it out if it is damaged"
        ) from error
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def first_line(error: Exception) -> str:
    """Returns the first line of a message; Arrow's others are about its own code."""
    return str(error).split("\n", 1)[0]


def _strings(column: Any) -> Any:
    """Returns a column of strings or bytes as an array that Arrow can drop the nulls of."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type) or pyarrow.types.is_binary_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return column


def _comparable(column: Any, kind: Kind) -> Any:
    """Returns a column in the type in which it is compared."""
    import pyarrow.compute

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if kind == "text":
        # As bytes: what is not UTF-8 is a value like any other, which differs from every literal.
        options = pyarrow.compute.CastOptions(pyarrow.large_string(), allow_invalid_utf8=True)
        return column.cast(options=options)
    return column.cast(pyarrow.float64(), safe=False) if kind == "a number" else column


def _column_problem(schema: Any, name: str, kind: Kind | None, key: str) -> tuple[str, str] | None:
    found = _types_of(schema, name)
    if not found:
        names = ", ".join(map(repr, schema.names))
        return bad_records.MISSING_FIELD, f"no column {name!r}; the file has {names}: set `{key}` of the source"
    for column in (name, name.split(".")[0]):
        count = schema.names.count(column)
        if count > 1:
            return bad_records.UNREADABLE, f"{count} columns are named {column!r}: rename all but the one to read"
    wrong = next((column for column in found if not _has_kind(column, kind)), None)
    if wrong is None:
        return None
    if kind is None:
        return bad_records.NOT_A_STRING, f"the column {name!r} holds {wrong}"
    return bad_records.NOT_COMPARABLE, f"`where` compares {name!r} with {kind}, and the column holds {wrong}"


def _types_of(schema: Any, name: str) -> list[Any]:
    """Returns the types of the columns that may hold a field: the one inside another, and the one of the whole name."""
    import pyarrow

    found = [field.type for field in schema if field.name == name]
    first, *rest = name.split(".")
    inner = [field.type for field in schema if rest and field.name == first]
    for part in rest:
        structs = [outer for outer in inner if pyarrow.types.is_struct(outer)]
        inner = [outer.field(part).type for outer in structs if outer.get_field_index(part) >= 0]
    return inner + found


def _has_kind(column: Any, kind: Kind | None) -> bool:
    """Returns whether a column can be compared with literals of a kind; with None, whether it can hold the text."""
    from pyarrow import types

    value = column.value_type if types.is_dictionary(column) else column
    if kind == "a number":
        return any(test(value) for test in (types.is_integer, types.is_floating, types.is_decimal))
    if kind == "true or false":
        return bool(types.is_boolean(value))
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(test(value) for test in (strings if kind == "text" else (*strings, *binary)))
