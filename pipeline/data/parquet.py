"""The text column of Parquet files, a batch of rows at a time."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pipeline.config import SourceConfig
from pipeline.data import bad
from pipeline.data.chunks import CHUNK_BYTES, Chunk, Gatherer, Piece
from pipeline.data.decompress import DamagedArchiveError, open_stream
from pipeline.data.records import from_arrow
from pipeline.data.sources import SourceFile

_MOST_ROWS = 1 << 16


def read_parquet(
    file: SourceFile, number: int, source: SourceConfig, gatherer: Gatherer, start: int, stop: int, last: bool
) -> Iterator[Chunk | Piece]:
    """The text of the row groups `[start, stop)`; `stop` -1 means to the end."""
    import pyarrow

    digest = hashlib.sha256()
    end = start
    with contextlib.ExitStack() as stack:
        try:
            table = stack.enter_context(_open(file))
        except (pyarrow.ArrowInvalid, OSError, DamagedArchiveError) as error:
            _reraise_of_system(error)
            reason = bad.TRUNCATED if isinstance(error, DamagedArchiveError) else bad.UNREADABLE
            gatherer.report(reason, lambda: "the whole file", _first_line(error))
            table = None
        if table is not None:
            end = table.num_row_groups if stop < 0 else stop
            problem = _column_problem(table, source.field)
            row = sum(table.metadata.row_group(g).num_rows for g in range(start))
            for group in range(start, end):
                rows = table.metadata.row_group(group).num_rows
                if problem is not None:
                    gatherer.report(problem[0], _row(row), problem[1], records=rows)
                else:
                    yield from _read_group(table, group, row, source.field, gatherer, digest)
                row += rows
                gatherer.read += file.size // table.num_row_groups
    yield Piece(number, start, end, digest.hexdigest(), last)


def row_group_sizes(file: SourceFile) -> list[int] | None:
    """Bytes of each row group of a plain file before Parquet's own compression; None if it cannot be read."""
    import pyarrow

    try:
        with _open(file) as table:
            return [table.metadata.row_group(g).total_byte_size for g in range(table.num_row_groups)]
    except (pyarrow.ArrowInvalid, OSError):
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


def _read_group(table: Any, group: int, first_row: int, field: str, gatherer: Gatherer, digest: Any) -> Iterator[Chunk]:
    import pyarrow

    info = table.metadata.row_group(group)
    row, end = first_row, first_row + info.num_rows
    mean = max(1, info.total_byte_size // max(1, info.num_rows))
    batch_rows = max(1, min(_MOST_ROWS, CHUNK_BYTES // mean))
    try:
        for batch in table.iter_batches(batch_rows, row_groups=[group], columns=[field], use_threads=False):
            _add(batch.column(0), row, field, gatherer, digest)
            row += len(batch)
            if gatherer.size >= CHUNK_BYTES:
                yield gatherer.take()
    except (pyarrow.ArrowInvalid, OSError) as error:
        _reraise_of_system(error)
        gatherer.report(bad.UNREADABLE, _row(row), _first_line(error), records=end - row)


def _add(column: Any, first_row: int, field: str, gatherer: Gatherer, digest: Any) -> None:
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    present = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    for index in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist() if column.null_count else []:
        gatherer.report(bad.MISSING_FIELD, _row(first_row + index), f"{field!r} is null")
    documents = from_arrow(column.drop_null() if column.null_count else column)
    digest.update(present.astype("<i8").tobytes() + documents.lengths.astype("<i8").tobytes())
    digest.update(documents.data[documents.offsets[0] : documents.offsets[-1]].data)
    gatherer.add(documents, lambda index, byte: _row(first_row + int(present[index]), byte))


def _column_problem(table: Any, field: str) -> tuple[str, str] | None:
    import pyarrow

    schema = table.schema_arrow
    if field not in schema.names:
        names = ", ".join(map(repr, schema.names))
        return bad.MISSING_FIELD, f"no column {field!r}; the file has {names}: set `field` of the source"
    kind = schema.field(field).type
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)
    if not any(test(value) for test in (*tests, *binary)):
        return bad.NOT_A_STRING, f"the column {field!r} holds {kind}"
    return None


def _row(row: int, byte: int | None = None) -> Callable[[], str]:
    within = "" if byte is None else f", byte {byte} of the text"
    return lambda: f"row {row} (from 0){within}"


def _reraise_of_system(error: Exception) -> None:
    """An error of the disk says nothing about the file; Arrow's own OSErrors, about damage, have no number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
