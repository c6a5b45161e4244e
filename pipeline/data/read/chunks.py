"""What the readers hand on: documents in chunks, and the ends of files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.read import bad_records
from pipeline.data.read.bad_records import BadInput
from pipeline.data.read.documents import Documents, Flags

# The documents of a chunk are encoded at once. Less than a block, so that a block of text is a chunk and is not copied.
CHUNK_BYTES = 3 << 20

# Where byte `n` of something is, for a message: made only when a message is.
Place = Callable[[int], Callable[[], str]]


@dataclass
class Chunk:
    """Documents that follow each other, none of them blank, all of them valid UTF-8.

    Attributes:
        documents: The texts.
        records: Records they were taken from, bad and blank ones included.
        empty: Documents of nothing but white space.
        bad: Skipped records by reason.
        read: Bytes of source files that were read, for the progress display.
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
        sha256: Digest of that content; of the text column for Parquet.
        last: Whether the task ends here.
        lost: Bytes on the disk that could not be read, or not be trusted: no count of records tells how much that is.
    """

    file: int
    start: int
    stop: int
    sha256: str
    last: bool
    lost: int = 0


class Gatherer:
    """Collects documents until they make a chunk, and keeps the bad and the blank ones out.

    Attributes:
        size: Bytes of the documents so far.
        read: Bytes of the source files read so far.
    """

    def __init__(self, policy: BadInput, limit: int) -> None:
        self._policy = policy
        self._limit = limit
        self._file = ""
        self._clear()

    def begin_file(self, path: str) -> None:
        """The file that messages name from here on."""
        self._file = path

    def add(self, documents: Documents, place: Callable[[int, int], Callable[[], str]]) -> None:
        """Takes documents; `place(i, b)` describes byte `b` of document `i`."""
        self._records += len(documents)
        too_long = documents.lengths > self._limit
        for index in np.flatnonzero(too_long).tolist():
            self._report_too_long(place(index, 0), int(documents.lengths[index]))
        if too_long.any():
            documents, place = _select(documents, place, too_long)
        if not documents.is_utf8():
            invalid = self._report_invalid(documents, place)
            documents = documents.without(invalid)
        blank = documents.blank()
        self._empty += int(blank.sum())
        documents = documents.without(blank)
        if len(documents):
            self._parts.append(documents)
            self.size += documents.text_bytes

    def report(self, reason: str, place: Callable[[], str], detail: str = "", records: int = 1) -> None:
        """Records that made no document."""
        self._records += records
        self._policy.report(reason, self._file, place, detail, records)

    def report_too_long(self, place: Callable[[], str]) -> None:
        """A record that was not read to its end."""
        self._records += 1
        self._report_too_long(place, None)

    def take(self) -> Chunk:
        """The chunk so far; a new one is begun."""
        chunk = Chunk(Documents.joined(self._parts), self._records, self._empty, self._policy.take(), self.read)
        self._clear()
        return chunk

    def _clear(self) -> None:
        self._parts: list[Documents] = []
        self._records = self._empty = self.size = self.read = 0

    def _report_too_long(self, place: Callable[[], str], size: int | None) -> None:
        has = f"{size} bytes, " if size is not None else ""
        allowed = f"data.max_document_mb allows {self._limit / 1e6:g} MB"
        self._policy.report(
            bad_records.TOO_LONG,
            self._file,
            place,
            f"{has}{allowed}; give a text source a `separator`, or raise the limit",
        )

    def _report_invalid(self, documents: Documents, place: Callable[[int, int], Callable[[], str]]) -> Flags:
        invalid = np.zeros(len(documents), np.bool_)
        for index, document in enumerate(documents):
            try:
                document.decode()
            except UnicodeDecodeError as error:
                invalid[index] = True
                self._policy.report(bad_records.INVALID_UTF8, self._file, place(index, error.start), error.reason)
        return invalid


def _select(
    documents: Documents, place: Callable[[int, int], Callable[[], str]], unwanted: Flags
) -> tuple[Documents, Callable[[int, int], Callable[[], str]]]:
    kept = np.flatnonzero(~unwanted).tolist()
    return documents.without(unwanted), lambda index, byte: place(kept[index], byte)
