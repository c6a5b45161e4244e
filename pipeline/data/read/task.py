"""A unit of reading: what one worker reads from start to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Task:
    """Something that one worker reads from start to end.

    Attributes:
        number: Place in the plan; slices are named after it and shards are ordered by it.
        source: Index of the source.
        kind: `files`: whole files; `range`: the records that begin in a range of bytes of one plain file;
            `stream`: one large file, cut into slices while it is read; `rows`: a range of a Parquet file's row groups.
        files: Indices of the source's files.
        start: First byte or row group.
        stop: The one after the last; -1 means to the end.
    """

    number: int
    source: int
    kind: Literal["files", "range", "stream", "rows"]
    files: tuple[int, ...]
    start: int = 0
    stop: int = -1
