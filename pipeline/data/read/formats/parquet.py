"""The text column of Parquet files, read in batches of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read import bad_records
from pipeline.data.read.chunks import ChunkBuilder, ReadItems
from pipeline.data.read.decompress import DamagedArchiveError
from pipeline.data.read.formats.columns import (
    FIRST_ROWS,
    Digest,
    TextColumn,
    first_line,
    more_rows,
    raise_system_error,
    row_place,
    unpacked,
    unreadable,
)
from pipeline.data.read.formats.parquet_pages import page_sizes
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part, TaskFile

# Arrow unpacks a whole page. Writers end one at about a megabyte; one document too many can be as long as the longest.
_LARGEST_PAGE = 256 << 20


class Parquet:
    """Parquet files; large ones are divided at row groups."""

    def __init__(self, source: SourceConfig) -> None:
        self._texts = TextColumn(source)

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
        digest = Digest()
        end, lost = start, 0
        with contextlib.ExitStack() as stack:
            try:
                table, source = stack.enter_context(_open(file))
            except unreadable() as error:
                raise_system_error(error, file.path)
                reason = bad_records.TRUNCATED if isinstance(error, DamagedArchiveError) else bad_records.UNREADABLE
                builder.report(reason, lambda: "the whole file", first_line(error))
                table, source, lost = None, None, file.size
            if table is not None:
                end = table.num_row_groups if stop < 0 else stop
                problem = self._texts.problem(table.schema_arrow)
                row = sum(table.metadata.row_group(g).num_rows for g in range(start))
                for group in range(start, end):
                    rows = table.metadata.row_group(group).num_rows
                    if problem is not None:
                        builder.report(problem[0], row_place(row), problem[1], records=rows)
                    elif rows:  # a group without rows may have no pages, and then no place in the file
                        yield from self._read_group(table, source, file.path, group, row, builder, digest)
                    row += rows
                    builder.bytes_read += file.size // table.num_row_groups
        yield wanted.span(start, end, digest.hexdigest(), lost)

    def _large_page(self, table: Any, source: Any, group: int, limit: int) -> str | None:
        """Returns what is wrong with a row group that would not fit into memory, or is damaged; None if nothing is."""
        largest = max(_LARGEST_PAGE, 2 * limit)
        try:
            info = table.metadata.row_group(group)
            columns = [info.column(index) for index in range(info.num_columns)]
            read = [column for column in columns if column.path_in_schema in self._texts.names]
            if not read:
                return "the footer does not say where the column is"
            sizes = (size for column in read for size in page_sizes(source, column))
            size = next((size for size in sizes if size > largest), None)
        except unreadable() as error:
            return first_line(error)
        return None if size is None else f"a page has {size:,} bytes, and at most {largest:,} are unpacked"

    def _read_group(
        self, table: Any, source: Any, path: str, group: int, first_row: int, builder: ChunkBuilder, digest: Digest
    ) -> ReadItems:
        info = table.metadata.row_group(group)
        row, end = first_row, first_row + info.num_rows
        large = self._large_page(table, source, group, builder.limit)
        if large is not None:
            builder.report(bad_records.UNREADABLE, row_place(row), large, records=info.num_rows)
            return
        # Only the encoded size: a text that is in a dictionary once can be in every row.
        mean = info.total_byte_size // max(1, info.num_rows)
        rows = min(FIRST_ROWS, more_rows(FIRST_ROWS, mean))
        try:
            for batch in table.iter_batches(rows, row_groups=[group], columns=self._texts.names, use_threads=False):
                size = yield from self._texts.read(batch, row, builder, digest)
                row += len(batch)
                rows = more_rows(rows, max(mean, size // len(batch)))
                table.reader.set_batch_size(rows)
        except unreadable() as error:
            raise_system_error(error, f"{path}, {row_place(row)()}")
            builder.report(bad_records.UNREADABLE, row_place(row), first_line(error), records=max(1, end - row))


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[tuple[Any, Any]]:
    """Yields a Parquet file and its bytes."""
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        if file.compression is None:
            place = pyarrow.OSFile(file.path)
        else:
            place = pyarrow.PythonFile(stack.enter_context(unpacked(file)), "r")
        stack.enter_context(place)
        # buffer_size: pages are read as they are needed, not a whole column of a row group at once.
        table = pyarrow.parquet.ParquetFile(place, buffer_size=1 << 20, pre_buffer=False)
        yield stack.enter_context(table), place


def _row_group_sizes(file: SourceFile) -> list[int]:
    """Returns the bytes of each row group before Parquet's own compression; none if the file cannot be read."""
    try:
        with _open(file) as (table, _):
            return [table.metadata.row_group(g).total_byte_size for g in range(table.num_row_groups)]
    except unreadable():
        return []
