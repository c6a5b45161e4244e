"""The text column of Parquet files, a batch of rows at a time."""

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
from pipeline.data.read.chunks import CHUNK_BYTES, Chunk, Gatherer, Piece
from pipeline.data.read.decompress import DamagedArchiveError, open_stream
from pipeline.data.read.documents import Documents
from pipeline.data.read.parse import from_arrow
from pipeline.data.read.sources import SourceFile
from pipeline.errors import DataError

_FIRST_ROWS, _MOST_ROWS = 1 << 6, 1 << 16


def read_parquet(
    file: SourceFile, number: int, source: SourceConfig, gatherer: Gatherer, start: int, stop: int, last: bool
) -> Iterator[Chunk | Piece]:
    """The text of the row groups `[start, stop)`; `stop` -1 means to the end."""
    digest = _Digest()
    end, lost = start, 0
    with contextlib.ExitStack() as stack:
        try:
            table = stack.enter_context(_open(file))
        except _unreadable() as error:
            _reraise_of_system(error, file.path)
            reason = bad_records.TRUNCATED if isinstance(error, DamagedArchiveError) else bad_records.UNREADABLE
            gatherer.report(reason, lambda: "the whole file", _first_line(error))
            table, lost = None, file.size
        if table is not None:
            end = table.num_row_groups if stop < 0 else stop
            problem = _column_problem(table, source.field)
            row = sum(table.metadata.row_group(g).num_rows for g in range(start))
            for group in range(start, end):
                rows = table.metadata.row_group(group).num_rows
                if problem is None:
                    yield from _read_group(table, file.path, group, row, source.field, gatherer, digest)
                elif rows:
                    gatherer.report(problem[0], _row(row), problem[1], records=rows)
                row += rows
                gatherer.read += file.size // table.num_row_groups
    yield Piece(number, start, end, digest.hexdigest(), last, lost)


def row_group_sizes(file: SourceFile) -> list[int] | None:
    """Bytes of each row group of a plain file before Parquet's own compression; None if it cannot be read."""
    try:
        with _open(file) as table:
            return [table.metadata.row_group(g).total_byte_size for g in range(table.num_row_groups)]
    except _unreadable():
        return None  # reading it will say what is wrong


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[Any]:
    """The Parquet file; one inside an archive is unpacked to a temporary file first, since it is not read in order."""
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


class _Digest:
    """Digest of texts and their rows that does not depend on how many of them come at once."""

    def __init__(self) -> None:
        self._shape, self._text = hashlib.sha256(), hashlib.sha256()

    def update(self, rows: npt.NDArray[np.int64], documents: Documents) -> None:
        self._shape.update(np.stack([rows, documents.lengths], axis=1).astype("<i8").data.cast("B"))
        self._text.update(documents.data[documents.offsets[0] : documents.offsets[-1]].data)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._shape.digest() + self._text.digest()).hexdigest()


def _read_group(
    table: Any, path: str, group: int, first_row: int, field: str, gatherer: Gatherer, digest: _Digest
) -> Iterator[Chunk]:
    info = table.metadata.row_group(group)
    row, end = first_row, first_row + info.num_rows
    # Only an encoded size: a text that stands in a dictionary once can be in every row.
    mean = max(1, info.total_byte_size // max(1, info.num_rows))
    rows = max(1, min(_FIRST_ROWS, CHUNK_BYTES // mean))
    try:
        for batch in table.iter_batches(rows, row_groups=[group], columns=[field], use_threads=False):
            size = 0
            for part in _parts(_strings(batch.column(0))):
                size += _add(part, row, field, gatherer, digest)
                row += len(part)
                if gatherer.size >= CHUNK_BYTES:
                    yield gatherer.take()
            rows = max(1, min(2 * rows, _MOST_ROWS, CHUNK_BYTES // max(mean, size // len(batch))))
            table.reader.set_batch_size(rows)
    except _unreadable() as error:
        _reraise_of_system(error, f"{path}, {_row(row)()}")
        gatherer.report(bad_records.UNREADABLE, _row(row), _first_line(error), records=max(1, end - row))


def _strings(column: Any) -> Any:
    """A column of strings or bytes as an array that Arrow can drop the nulls of."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string_view(column.type) or pyarrow.types.is_binary_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return column


def _parts(column: Any) -> Iterator[Any]:
    """The rows of a batch, few at a time if they turned out long."""
    rows = max(1, CHUNK_BYTES * len(column) // max(1, column.nbytes))
    return (column.slice(start, rows) for start in range(0, len(column), rows))


def _add(column: Any, first_row: int, field: str, gatherer: Gatherer, digest: _Digest) -> int:
    """Hands on the texts of a column; returns their bytes."""
    present = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    for index in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist() if column.null_count else []:
        gatherer.report(bad_records.MISSING_FIELD, _row(first_row + index), f"{field!r} is null")
    documents = from_arrow(column.drop_null() if column.null_count else column)
    digest.update(first_row + present, documents)
    gatherer.add(documents, lambda index, byte: _row(first_row + int(present[index]), byte))
    return documents.text_bytes


def _column_problem(table: Any, field: str) -> tuple[str, str] | None:
    import pyarrow

    schema = table.schema_arrow
    if field not in schema.names:
        names = ", ".join(map(repr, schema.names))
        return bad_records.MISSING_FIELD, f"no column {field!r}; the file has {names}: set `field` of the source"
    if schema.names.count(field) > 1:
        return (
            bad_records.UNREADABLE,
            f"{schema.names.count(field)} columns are named {field!r}: rename all but the one to read",
        )
    kind = schema.field(field).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)
    if not any(test(value) for test in (*tests, *binary)):
        return bad_records.NOT_A_STRING, f"the column {field!r} holds {kind}"
    return None


def _row(row: int, byte: int | None = None) -> Callable[[], str]:
    within = "" if byte is None else f", byte {byte} of the text"
    return lambda: f"row {row} (from 0){within}"


def _unreadable() -> tuple[type[Exception], ...]:
    """What a damaged file raises; ValueError, for one, if the names in its footer are no UTF-8."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, DamagedArchiveError


def _reraise_of_system(error: Exception, place: str) -> None:
    """An error of disk or memory says nothing about the file; Arrow's own OSErrors, about damage, have no number."""
    if isinstance(error, MemoryError):
        raise DataError(
            f"{place}: takes more memory than there is ({_first_line(error)}); "
            "prepare it with more, write it with smaller row groups, or leave it out if it is damaged"
        ) from error
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
