"""The text column of Parquet files, read in batches of rows."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read import bad_records
from pipeline.data.read.chunks import CHUNK_BYTES, ChunkBuilder, ReadItems
from pipeline.data.read.decompress import DamagedArchiveError, open_stream
from pipeline.data.read.documents import Documents
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part, TaskFile
from pipeline.errors import DataError

_FIRST_ROWS, _MOST_ROWS = 1 << 6, 1 << 16


class Parquet:
    """Parquet files; large ones are divided at row groups."""

    def __init__(self, source: SourceConfig) -> None:
        self._field = source.field

    def split(self, file: SourceFile, slice_bytes: int) -> list[Part]:
        """Returns ranges of row groups that together have at least the size of a slice, before Parquet's compression.

        An archive around the file is not divided: every part would have to unpack all of it.
        """
        if file.compression:
            return []
        sizes = _row_group_sizes(file)
        if not sizes:
            return [Part("rows")]  # reading it will say what is wrong
        parts, start, size = [], 0, 0
        for group, group_size in enumerate(sizes):
            size += group_size
            if size >= slice_bytes or group == len(sizes) - 1:
                parts.append(Part("rows", start, group + 1))
                start, size = group + 1, 0
        return parts

    def read(self, wanted: TaskFile, builder: ChunkBuilder) -> ReadItems:
        """Yields the texts of the row groups of a part."""
        file, (_, start, stop) = wanted.file, wanted.part
        digest = _Digest()
        end, lost = start, 0
        with contextlib.ExitStack() as stack:
            try:
                table = stack.enter_context(_open(file))
            except _unreadable() as error:
                _raise_system_error(error, file.path)
                reason = bad_records.TRUNCATED if isinstance(error, DamagedArchiveError) else bad_records.UNREADABLE
                builder.report(reason, lambda: "the whole file", _first_line(error))
                table, lost = None, file.size
            if table is not None:
                end = table.num_row_groups if stop < 0 else stop
                problem = _column_problem(table, self._field)
                row = sum(table.metadata.row_group(g).num_rows for g in range(start))
                for group in range(start, end):
                    rows = table.metadata.row_group(group).num_rows
                    if problem is None:
                        yield from self._read_group(table, file.path, group, row, builder, digest)
                    elif rows:
                        builder.report(problem[0], _row_place(row), problem[1], records=rows)
                    row += rows
                    builder.bytes_read += file.size // table.num_row_groups
        yield wanted.span(start, end, digest.hexdigest(), lost)

    def _read_group(
        self, table: Any, path: str, group: int, first_row: int, builder: ChunkBuilder, digest: _Digest
    ) -> ReadItems:
        info = table.metadata.row_group(group)
        row, end = first_row, first_row + info.num_rows
        # Only the encoded size: a text that is in a dictionary once can be in every row.
        mean = max(1, info.total_byte_size // max(1, info.num_rows))
        rows = max(1, min(_FIRST_ROWS, CHUNK_BYTES // mean))
        try:
            for batch in table.iter_batches(rows, row_groups=[group], columns=[self._field], use_threads=False):
                size = 0
                for part in _parts(_strings(batch.column(0))):
                    size += self._add(part, row, builder, digest)
                    row += len(part)
                    if builder.is_full:
                        yield builder.take()
                rows = max(1, min(2 * rows, _MOST_ROWS, CHUNK_BYTES // max(mean, size // len(batch))))
                table.reader.set_batch_size(rows)
        except _unreadable() as error:
            _raise_system_error(error, f"{path}, {_row_place(row)()}")
            builder.report(bad_records.UNREADABLE, _row_place(row), _first_line(error), records=max(1, end - row))

    def _add(self, column: Any, first_row: int, builder: ChunkBuilder, digest: _Digest) -> int:
        """Adds the texts of a column and returns their bytes."""
        present = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
        if column.null_count:
            for index in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
                builder.report(bad_records.MISSING_FIELD, _row_place(first_row + index), f"{self._field!r} is null")
            column = column.drop_null()
        documents = Documents.from_arrow(column)
        digest.update(first_row + present, documents)
        builder.add(documents, lambda index, byte: _row_place(first_row + int(present[index]), byte))
        return documents.text_bytes


class _Digest:
    """Digest of texts and their rows that does not depend on how many of them come at once."""

    def __init__(self) -> None:
        self._shape, self._text = hashlib.sha256(), hashlib.sha256()

    def update(self, rows: npt.NDArray[np.int64], documents: Documents) -> None:
        self._shape.update(np.stack([rows, documents.lengths], axis=1).astype("<i8").data.cast("B"))
        self._text.update(documents.data[documents.offsets[0] : documents.offsets[-1]].data)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._shape.digest() + self._text.digest()).hexdigest()


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[Any]:
    """Opens a Parquet file; one in an archive is unpacked to a temporary file first, since it is not read in order."""
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        place: Any = file.path
        if file.compression is not None:
            place = stack.enter_context(tempfile.TemporaryFile())
            with open_stream(file.path, file.compression) as stream:
                while piece := stream.read(1 << 20):
                    place.write(piece)
            place.seek(0)
        # buffer_size: pages are read as they are needed, not a whole column of a row group at once.
        yield stack.enter_context(pyarrow.parquet.ParquetFile(place, buffer_size=1 << 20, pre_buffer=False))


def _row_group_sizes(file: SourceFile) -> list[int]:
    """Returns the bytes of each row group before Parquet's own compression; none if the file cannot be read."""
    try:
        with _open(file) as table:
            return [table.metadata.row_group(g).total_byte_size for g in range(table.num_row_groups)]
    except _unreadable():
        return []


def _strings(column: Any) -> Any:
    """Returns a column of strings or bytes as an array that Arrow can drop the nulls of."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type) or pyarrow.types.is_binary_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return column


def _parts(column: Any) -> Iterator[Any]:
    """Yields the rows of a batch, few at a time if they turned out long."""
    rows = max(1, CHUNK_BYTES * len(column) // max(1, column.nbytes))
    return (column.slice(start, rows) for start in range(0, len(column), rows))


def _column_problem(table: Any, field: str) -> tuple[str, str] | None:
    """Returns the reason and the detail, or None if the column holds text."""
    import pyarrow

    schema = table.schema_arrow
    if field not in schema.names:
        names = ", ".join(map(repr, schema.names))
        return bad_records.MISSING_FIELD, f"no column {field!r}; the file has {names}: set `field` of the source"
    count = schema.names.count(field)
    if count > 1:
        return bad_records.UNREADABLE, f"{count} columns are named {field!r}: rename all but the one to read"
    kind = schema.field(field).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)
    if not any(test(value) for test in (*tests, *binary)):
        return bad_records.NOT_A_STRING, f"the column {field!r} holds {kind}"
    return None


def _row_place(row: int, byte: int | None = None) -> Callable[[], str]:
    within = "" if byte is None else f", byte {byte} of the text"
    return lambda: f"row {row} (from 0){within}"


def _unreadable() -> tuple[type[Exception], ...]:
    """Returns the errors that a damaged file raises; ValueError, for example, if names in its footer are not UTF-8."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, DamagedArchiveError


def _raise_system_error(error: Exception, place: str) -> None:
    """Raises errors of disk and memory, which are not damage; Arrow's own OSErrors, about damage, have no number."""
    if isinstance(error, MemoryError):
        raise DataError(
            f"{place}: takes more memory than there is ({_first_line(error)}); "
            "prepare it with more, write it with smaller row groups, or leave it out if it is damaged"
        ) from error
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
