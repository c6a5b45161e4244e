"""Divides token files at documents into pieces of bounded size, which become shards, and writes their indices."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipeline.data.adopt.token_file import Ends, TokenFile
from pipeline.files import fsync_file, open_regular

# Pieces are hashed side by side, also those of one large file, by this and by every later `pipeline verify`.
PIECE_BYTES = 1 << 30
_SEARCHED_AT_ONCE = 1 << 22


class IndexWriter:
    """Writes the ends of the documents of one piece, from the piece's first token; see `layout`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._out = path.open("wb")
        self._digest = hashlib.sha256()
        self._last = self.documents = self.longest = self.empty = 0
        self._write(np.zeros(1, np.int64))

    def add(self, ends: Ends) -> None:
        """Writes ends that follow the earlier ones; leaves out documents without tokens."""
        lengths = np.diff(ends, prepend=self._last)
        ends = ends[lengths > 0]
        self.empty += len(lengths) - len(ends)
        if len(ends):
            self._write(ends)
            self.documents += len(ends)
            self.longest = max(self.longest, int(lengths.max()))
            self._last = int(ends[-1])

    def finish(self, tokens: int) -> str:
        """Makes the file durable and returns its digest; what follows the last end is a document too."""
        if self._last < tokens:
            self.add(np.array([tokens]))
        self._out.close()
        fsync_file(self.path)
        return self._digest.hexdigest()

    def _write(self, ends: Ends) -> None:
        content = ends.astype("<u8").tobytes()
        self._out.write(content)
        self._digest.update(content)


@dataclass(frozen=True)
class Piece:
    """A range of the tokens of a file that begins and ends with a document."""

    file: TokenFile
    start: int
    """First token."""
    stop: int
    """The one after the last."""
    index: IndexWriter
    """Ready where the format has told the documents; else the scan fills it."""

    @property
    def bytes(self) -> int:
        """Size of its tokens."""
        return (self.stop - self.start) * self.file.dtype.itemsize


def divide(file: TokenFile, cuts: Sequence[int], end_id: int, folder: Path, first: int) -> list[Piece]:
    """Returns the pieces of a file, whose indices are files in `folder`, numbered from `first`.

    Args:
        file: The file.
        cuts: Tokens at or behind which further pieces begin, with the next document.
        end_id: The end-of-text token.
        folder: Where the indices go.
        first: Number of the first index.
    """
    size = max(1, PIECE_BYTES // file.dtype.itemsize)
    wanted = sorted({*range(size, file.tokens, size), *cuts})
    if file.ends is not None:
        return _divide_by_index(file, wanted, folder, first)
    bounds = sorted({0, *_next_ends(file, wanted, end_id), file.tokens})
    return [
        Piece(file, start, stop, IndexWriter(_index_file(folder, first + number)))
        for number, (start, stop) in enumerate(itertools.pairwise(bounds))
    ]


def _divide_by_index(file: TokenFile, wanted: Sequence[int], folder: Path, first: int) -> list[Piece]:
    assert file.ends is not None
    pieces: list[Piece] = []
    start, waiting = 0, [cut for cut in wanted if cut > 0]
    writer = IndexWriter(_index_file(folder, first))
    for ends in file.ends():
        while waiting and len(ends) and ends[-1] >= waiting[0]:
            count = int(np.searchsorted(ends, waiting[0])) + 1
            writer.add(ends[:count] - start)
            stop, ends = int(ends[count - 1]), ends[count:]
            waiting = [cut for cut in waiting if cut > stop]
            if stop < file.tokens:
                pieces.append(Piece(file, start, stop, writer))
                start, writer = stop, IndexWriter(_index_file(folder, first + len(pieces)))
        writer.add(ends - start)
    return [*pieces, Piece(file, start, file.tokens, writer)]


def _next_ends(file: TokenFile, wanted: Sequence[int], end_id: int) -> list[int]:
    """Returns the first document end at or behind each token; the end of the file where there is none."""
    found: list[int] = []
    for cut in wanted:
        # What was searched for an earlier cut need not be searched again.
        found.append(found[-1] if found and found[-1] >= cut else _next_end(file, cut, end_id))
    return found


def _next_end(file: TokenFile, cut: int, end_id: int) -> int:
    place = max(0, cut - 1)
    with open_regular(file.path) as source:
        source.seek(file.offset + place * file.dtype.itemsize)
        while place < file.tokens:
            count = min(_SEARCHED_AT_ONCE, file.tokens - place)
            ids: npt.NDArray[np.integer] = np.frombuffer(source.read(count * file.dtype.itemsize), file.dtype)
            at = np.flatnonzero(ids == end_id)
            if len(at):
                return place + int(at[0]) + 1
            place += count
    return file.tokens


def _index_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.idx"
