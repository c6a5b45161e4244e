"""The output of readers: documents in chunks, without bad and blank ones, and the spans between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.read import bad_records
from pipeline.data.read.bad_records import BadRecordPolicy
from pipeline.data.read.documents import Documents, Flags
from pipeline.data.read.task import FileSpan

# The documents of a chunk are encoded at once. Less than a block, so that a block of text is a chunk and is not copied.
CHUNK_BYTES = 3 << 20

# Describes the location of byte `n`; evaluated only for an error message.
Place = Callable[[int], Callable[[], str]]
# The same for byte `b` of document `i`.
DocumentPlace = Callable[[int, int], Callable[[], str]]


@dataclass
class Chunk:
    """Consecutive documents, none of them blank, all of them valid UTF-8."""

    documents: Documents
    records: int = 0
    """Records they were taken from, bad and blank ones included."""
    empty: int = 0
    """Documents of nothing but white space."""
    dropped: int = 0
    """Records of which the condition of the source is not true."""
    bad: Counter[str] = field(default_factory=Counter)
    """Skipped records by reason."""
    bytes_read: int = 0
    """Bytes of source files that were read, for the progress display."""


ReadItems = Iterator[Chunk | FileSpan]


class ChunkBuilder:
    """Collects documents until they make a chunk, and leaves out bad and blank ones."""

    def __init__(self, policy: BadRecordPolicy, limit: int) -> None:
        self.limit = limit  # bytes of the longest document
        self._policy = policy
        self._file = ""
        self._clear()

    @property
    def is_full(self) -> bool:
        """Whether the documents so far make a chunk."""
        return self._text_bytes >= CHUNK_BYTES

    def begin_file(self, path: str) -> None:
        """Sets the file that messages name from here on."""
        self._file = path

    def add(self, documents: Documents, place: DocumentPlace) -> None:
        """Adds documents; each is a record."""
        self._records += len(documents)
        too_long = documents.lengths > self.limit
        for index in np.flatnonzero(too_long).tolist():
            self._report_too_long(place(index, 0), f"{int(documents.lengths[index])} bytes, ")
        if too_long.any():
            documents, place = _without(too_long, documents, place)
        if not documents.is_utf8():
            documents = documents.without(self._report_invalid(documents, place))
        blank = documents.blank()
        self._empty += int(blank.sum())
        documents = documents.without(blank)
        if len(documents):
            self._parts.append(documents)
            self._text_bytes += documents.text_bytes

    def drop(self, records: int) -> None:
        """Counts records of which the condition of the source is not true."""
        self._records += records
        self._dropped += records

    def report(self, reason: str, place: Callable[[], str], detail: str = "", records: int = 1) -> None:
        """Reports records that gave no document."""
        self._records += records
        self._policy.report(reason, self._file, place, detail, records)

    def report_too_long(self, place: Callable[[], str]) -> None:
        """Reports a record that was not kept in memory to its end."""
        self._records += 1
        self._report_too_long(place)

    def take(self) -> Chunk:
        """Returns the chunk so far and begins a new one."""
        documents = Documents.joined(self._parts)
        chunk = Chunk(documents, self._records, self._empty, self._dropped, self._policy.take(), self.bytes_read)
        self._clear()
        return chunk

    def _clear(self) -> None:
        self._parts: list[Documents] = []
        self._records = self._empty = self._dropped = self._text_bytes = 0
        self.bytes_read = 0  # of the source files, counted by the format

    def _report_too_long(self, place: Callable[[], str], size: str = "") -> None:
        detail = (
            f"{size}data.max_document_mb allows {self.limit / 1e6:g} MB; "
            "give a text source a `separator`, or raise the limit"
        )
        self._policy.report(bad_records.TOO_LONG, self._file, place, detail)

    def _report_invalid(self, documents: Documents, place: DocumentPlace) -> Flags:
        invalid = np.zeros(len(documents), np.bool_)
        for index, document in enumerate(documents):
            try:
                document.decode()
            except UnicodeDecodeError as error:
                invalid[index] = True
                self._policy.report(bad_records.INVALID_UTF8, self._file, place(index, error.start), error.reason)
        return invalid


def _without(unwanted: Flags, documents: Documents, place: DocumentPlace) -> tuple[Documents, DocumentPlace]:
    kept = np.flatnonzero(~unwanted).tolist()
    return documents.without(unwanted), lambda index, byte: place(kept[index], byte)
