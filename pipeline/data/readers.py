"""Files to documents: reads a task in pieces of bounded size."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.config import DataConfig, SourceConfig
from pipeline.data import bad
from pipeline.data.bad import BadInput
from pipeline.data.decompress import DamagedArchiveError, open_stream, read_some
from pipeline.data.plan import Task
from pipeline.data.sources import SourceFile
from pipeline.data.text import Documents

CHUNK_BYTES = 4 << 20


@dataclass
class Chunk:
    """Some documents that follow each other, none of them empty, all of them valid UTF-8.

    Attributes:
        documents: The texts.
        records: Records they were taken from, bad and empty ones included.
        empty: Documents of nothing but white space.
        bad: Skipped records by reason.
        read: Bytes of the source files that were read, for the progress display.
    """

    documents: Documents
    records: int = 0
    empty: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    read: int = 0


@dataclass(frozen=True)
class Piece:
    """The end of a file, or of the part of it that belongs to a slice.

    Attributes:
        file: Index of the file in its source.
        start: First byte of its (decompressed) content, or first row group.
        stop: The one after the last.
        sha256: Digest of that content.
        last: Whether the task ends here.
    """

    file: int
    start: int
    stop: int
    sha256: str
    last: bool


def read_task(
    task: Task, source: SourceConfig, files: Sequence[SourceFile], data: DataConfig
) -> Iterator[Chunk | Piece]:
    """The documents of a task, and where its files end."""
    handler = BadInput(data.on_bad)
    limit = int(data.max_document_mb * 1e6)
    pending = _Pending(handler)
    for place, number in enumerate(task.files):
        digest = hashlib.sha256()
        file = files[number]
        content = _whole(file, handler, limit, digest)
        stop = 0
        if content is not None:
            stop = len(content)
            pending.add(content, file, 0)
        pending.read += file.size
        if pending.size >= CHUNK_BYTES:
            yield pending.take()
        yield Piece(number, 0, stop, digest.hexdigest(), place == len(task.files) - 1)
    yield pending.take()


class _Pending:
    """Documents of several files, until they make a chunk."""

    def __init__(self, handler: BadInput) -> None:
        self._handler = handler
        self._documents: list[bytes] = []
        self._records = self._empty = self.size = self.read = 0

    def add(self, document: bytes, file: SourceFile, offset: int) -> None:
        self._records += 1
        try:
            document.decode()
        except UnicodeDecodeError as error:
            line = document.count(b"\n", 0, error.start) + 1
            self._handler.report(bad.INVALID_UTF8, file.path, f"line {line}, byte {offset + error.start}", error.reason)
            return
        if not document.strip():
            self._empty += 1
            return
        self._documents.append(document)
        self.size += len(document)

    def take(self) -> Chunk:
        chunk = Chunk(Documents.of(self._documents), self._records, self._empty, self._handler.take(), self.read)
        self._documents = []
        self._records = self._empty = self.size = self.read = 0
        return chunk


def _whole(file: SourceFile, handler: BadInput, limit: int, digest: hashlib._Hash) -> bytes | None:
    content = []
    size = 0
    try:
        with open_stream(file.path, file.compression) as stream:
            while piece := read_some(stream, CHUNK_BYTES):
                digest.update(piece)
                size += len(piece)
                if size <= limit:
                    content.append(piece)
    except DamagedArchiveError as error:
        handler.report(bad.TRUNCATED, file.path, f"byte {size} of the decompressed text", str(error))
        return None
    if size > limit:
        handler.report(
            bad.TOO_LONG,
            file.path,
            "byte 0",
            f"{size} bytes, data.max_document_mb allows {limit}; give the source a `separator`",
        )
        return None
    return b"".join(content)
