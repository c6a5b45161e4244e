"""Arrow files, streams and files of its IPC format alike: what `datasets.save_to_disk` writes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read import bad_records
from pipeline.data.read.chunks import ChunkBuilder, ReadItems
from pipeline.data.read.decompress import DamagedArchiveError
from pipeline.data.read.fields import find_column
from pipeline.data.read.formats.arrow_messages import Batch, record_batches, stream_start
from pipeline.data.read.formats.columns import (
    FIRST_ROWS,
    Digest,
    TextColumn,
    columns_of,
    first_line,
    more_rows,
    raise_system_error,
    row_place,
    unpacked,
    unreadable,
)
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part, TaskFile


class Arrow:
    """Arrow files; large ones are divided at record batches."""

    def __init__(self, source: SourceConfig) -> None:
        self._texts = TextColumn(source)

    def split(self, file: SourceFile, slice_bytes: int) -> list[Part]:
        """Returns ranges of record batches that together have at least the size of a slice.

        An archive around the file is not divided: every part would have to unpack all of it.
        """
        if file.compression:
            return []
        parts, start, size, number, intact = [], 0, 0, -1, False
        # Reading the file will say what is wrong with it.
        with contextlib.suppress(*unreadable()), _content(file) as content:
            for number, batch in enumerate(record_batches(memoryview(content))):
                size += batch.body_bytes
                if size >= slice_bytes:
                    parts.append(Part("rows", start, number + 1))
                    start, size = number + 1, 0
            intact = True
        if not intact:
            return [*parts, Part("rows", start)]  # without an end: the damage belongs to it
        return parts if start > number and parts else [*parts, Part("rows", start, number + 1)]

    def read(self, wanted: TaskFile, builder: ChunkBuilder) -> ReadItems:
        """Yields the texts of the record batches of a part."""
        file, (_, start, stop) = wanted.file, wanted.part
        digest, row, end, intact, lost = Digest(), 0, 0, 0, 0
        try:
            with _content(file) as content:
                schema, batches = self._open(content)
                problem = self._texts.problem(schema)
                for end, (found, batch) in enumerate(itertools.islice(batches, stop if stop >= 0 else None), 1):
                    if end > start:
                        if problem is None:
                            yield from self._read_batch(batch, row, builder, digest)
                        else:
                            builder.report(problem[0], row_place(row), problem[1], records=len(batch))
                        builder.bytes_read += file.size * (found.stop - intact) // len(content)
                    row, intact = row + len(batch), found.stop
        except unreadable() as error:
            raise_system_error(error, file.path)
            reason = bad_records.TRUNCATED if isinstance(error, DamagedArchiveError) else bad_records.UNREADABLE_ARROW
            builder.report(reason, row_place(row), first_line(error))
            lost = file.size if file.compression else file.size - intact
        yield wanted.span(start, max(start, end), digest.hexdigest(), lost)

    def _open(self, content: Any) -> tuple[Any, Iterator[tuple[Batch, Any]]]:
        """Returns the schema of a file and its record batches, of which only the columns in question are loaded."""
        import pyarrow.ipc

        stream = content.slice(stream_start(memoryview(content)))
        schema = pyarrow.ipc.open_stream(stream).schema
        outer = {part for name in self._texts.names for part in (name, name.split(".")[0])}
        options = pyarrow.ipc.IpcReadOptions(included_fields=[i for i, n in enumerate(schema.names) if n in outer])
        reader = pyarrow.ipc.open_stream(stream, options=options)
        return schema, ((found, reader.read_next_batch()) for found in record_batches(memoryview(content)))

    def _read_batch(self, batch: Any, first_row: int, builder: ChunkBuilder, digest: Digest) -> ReadItems:
        start, rows = 0, FIRST_ROWS
        try:
            batch = self._validated(batch)
            while start < len(batch):
                piece = batch.slice(start, rows)
                size = yield from self._texts.read(piece, first_row + start, builder, digest)
                start += len(piece)
                rows = more_rows(rows, size // len(piece))
        except unreadable() as error:
            place = row_place(first_row + start)
            raise_system_error(error, place())
            builder.report(bad_records.UNREADABLE_ARROW, place, first_line(error), records=len(batch) - start)

    def _validated(self, batch: Any) -> Any:
        """Returns the fields in question as columns; what lies beside them in a struct can be damaged."""
        import pyarrow

        batch.validate()
        columns = [find_column(columns_of(batch), name, _validated) for name in self._texts.names]
        return pyarrow.RecordBatch.from_arrays(columns, names=self._texts.names)


@contextlib.contextmanager
def _content(file: SourceFile) -> Iterator[Any]:
    """Yields the mapped bytes of a file: whatever the size of its batches, they take no memory of their own."""
    import pyarrow

    with contextlib.ExitStack() as stack:
        path = file.path
        if file.compression is not None:
            path = f"/proc/self/fd/{stack.enter_context(unpacked(file)).fileno()}"
        yield stack.enter_context(pyarrow.memory_map(path)).read_buffer()


def _validated(column: Any) -> Any:
    """Returns a column whose offsets all lie in its buffers, which Arrow does not check when it reads.

    Text becomes bytes: whether it is UTF-8 is the matter of each record.
    """
    import pyarrow

    kinds = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        kind = pyarrow.dictionary(kind.index_type, kinds.get(kind.value_type, kind.value_type), kind.ordered)
    column = column.view(kinds.get(kind, kind))
    column.validate(full=True)
    return column
