"""Units of reading: a task, its files, and the spans of them that were read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipeline.data.read.sources import SourceFile

Kind = Literal["files", "range", "stream", "rows"]


class Part(NamedTuple):
    """What one task reads of a large file."""

    kind: Kind
    start: int = 0
    stop: int = -1


@dataclass(frozen=True, slots=True)
class Task:
    """What one worker reads from start to end."""

    number: int
    """Place in the plan; slices are named after it and shards are ordered by it."""
    source: int
    """Index of the source."""
    kind: Kind
    """`files`: whole files; `range`: the records that begin in a range of bytes of one plain file;
    `stream`: one large file, cut into slices while it is read; `rows`: a range of a Parquet file's row groups."""
    files: tuple[int, ...]
    """Indices of the source's files."""
    start: int = 0
    """First byte or row group."""
    stop: int = -1
    """The one after the last; -1 means to the end."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """A file, or the part of it that belongs to a slice, after it was read."""

    file: int
    """Index of the file in its source."""
    start: int
    """First byte of its (decompressed) content, or first row group."""
    stop: int
    """The one after the last."""
    sha256: str
    """Digest of that content; of the text column for Parquet."""
    last: bool
    """Whether the task ends here."""
    lost: int = 0
    """Bytes on disk that could not be read or cannot be trusted; the count of bad records does not show how many."""


@dataclass(frozen=True, slots=True)
class TaskFile:
    """One file of a task, as a format is asked to read it."""

    file: SourceFile
    number: int
    """Index of the file in its source."""
    part: Part
    last: bool
    """Whether it is the last file of the task."""
    slice_bytes: int | None
    """A slice ends with the first record that ends at or after a multiple of this; None: with the task."""

    def span(self, start: int, stop: int, sha256: str, lost: int = 0) -> FileSpan:
        """Returns the span that ends what the task reads of this file."""
        return FileSpan(self.number, start, stop, sha256, self.last, lost)
