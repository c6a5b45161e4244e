"""Text files: one document per file, or one per record where the source names a separator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from pipeline.config.data_sections import SourceConfig
from pipeline.data.read import bad_records
from pipeline.data.read.chunks import ChunkBuilder, Place, ReadItems
from pipeline.data.read.decompress import DamagedArchiveError, open_stream
from pipeline.data.read.documents import Documents
from pipeline.data.read.formats.records import RecordFormat, byte_place, record_place
from pipeline.data.read.record_blocks import BLOCK_BYTES
from pipeline.data.read.sources import SourceFile
from pipeline.data.read.task import Part, TaskFile


class Text(RecordFormat):
    """Plain text; a file without a separator is never divided."""

    def __init__(self, source: SourceConfig) -> None:
        super().__init__((source.separator or "").encode())

    def split(self, file: SourceFile, slice_bytes: int) -> list[Part]:
        """Returns the parts of a file of records; none for a file that is one document."""
        return super().split(file, slice_bytes) if self._separator else []

    def read(self, wanted: TaskFile, builder: ChunkBuilder) -> ReadItems:
        """Yields the documents between separators, or the whole file as one."""
        return super().read(wanted, builder) if self._separator else _read_whole(wanted, builder)

    def _longest_record(self, limit: int) -> int:
        return limit + len(self._separator)

    def _add(self, block: bytes, builder: ChunkBuilder, place: Place) -> None:
        """Adds the documents of a block; what follows the last separator is one if it is not empty."""
        width = len(self._separator)
        ends = np.fromiter(_offsets(block, self._separator), np.int64)
        # One copy of the text for all documents, instead of one for each and another to join them.
        data = np.frombuffer(block.replace(self._separator, b""), np.uint8)
        bounds = np.concatenate(([0], ends - np.arange(len(ends)) * width))
        offsets = bounds if bounds[-1] == len(data) else np.append(bounds, len(data))
        builder.add(Documents(data, offsets), lambda index, byte: place(int(offsets[index]) + index * width + byte))


def _offsets(block: bytes, separator: bytes) -> Iterator[int]:
    found = block.find(separator)
    while found >= 0:
        yield found
        found = block.find(separator, found + len(separator))


def _read_whole(wanted: TaskFile, builder: ChunkBuilder) -> ReadItems:
    file = wanted.file
    digest = hashlib.sha256()
    content: list[bytes] = []
    size = 0
    damage: DamagedArchiveError | None = None
    with open_stream(file.path, file.compression) as stream:
        try:
            while piece := stream.read(BLOCK_BYTES):
                digest.update(piece)
                size += len(piece)
                # Beyond the limit the rest is still read, for the digest, but not kept.
                content = [*content, piece] if size <= builder.limit else []
        except DamagedArchiveError as error:
            damage = error
        builder.bytes_read += stream.position
    if damage is not None:
        builder.report(bad_records.TRUNCATED, byte_place(file, size), str(damage))
    elif size > builder.limit:
        builder.report_too_long(record_place(file, 0))
    else:
        builder.add(Documents.of([b"".join(content)]), lambda _, byte: record_place(file, byte))
    if builder.is_full:
        yield builder.take()
    yield wanted.span(0, size, digest.hexdigest(), file.size if damage is not None else 0)
