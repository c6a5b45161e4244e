"""Plain, gzip, Zstandard, bzip2 and xz files as one stream of bytes each."""

from __future__ import annotations

import contextlib
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What is read before the place where an archive is damaged is kept up to this much.
_READ_BYTES = 1 << 18

# Arrow reads all members and frames of a file, notices its early end (zstandard's own reader does not), and
# lets other threads run meanwhile. It has no xz; Python's lzma has, and reads all streams too.
_ARROW_CODECS = {"gz": "gzip", "zst": "zstd", "bz2": "bz2"}


class DamagedArchiveError(Exception):
    """The archive ends early, or a checksum in it is wrong."""


@dataclass
class Stream:
    """A file that is read from its start to its end.

    Attributes:
        content: The decompressed bytes.
        raw: The bytes on the disk.
        compressed: Whether the two differ.
    """

    content: Any
    raw: Any
    compressed: bool

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only before the end or before damage; none at the end.

        Raises:
            DamagedArchiveError: The archive is damaged here.
        """
        pieces: list[bytes] = []
        missing = size
        while missing > 0:
            try:
                piece = self.content.read(min(missing, _READ_BYTES) if self.compressed else missing)
            except (EOFError, lzma.LZMAError, ValueError, OSError) as error:
                # An error of the disk is no damage of the archive: it must not be skipped like a bad record.
                if not self.compressed or (isinstance(error, OSError) and error.errno is not None):
                    raise
                if pieces:
                    break  # the next call meets the damage again
                raise DamagedArchiveError(str(error) or type(error).__name__) from error
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def move_to(self, offset: int) -> None:
        """Goes to a byte of the content, from its start."""
        if not self.compressed:
            self.content.seek(offset)
            return
        while offset > 0:
            piece = self.read(min(offset, 1 << 22))
            if not piece:
                return
            offset -= len(piece)

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress displays."""
        return int(self.raw.tell())


@contextlib.contextmanager
def open_stream(path: str | Path, compression: str | None) -> Iterator[Stream]:
    """The content of a file, decompressed; several members or frames are read one after the other."""
    if compression in _ARROW_CODECS:
        import pyarrow

        with (
            pyarrow.OSFile(str(path), "rb") as arrow_raw,
            pyarrow.CompressedInputStream(arrow_raw, _ARROW_CODECS[compression]) as content,
        ):
            yield Stream(content, arrow_raw, compressed=True)
        return
    with Path(path).open("rb", buffering=0) as raw:
        if compression is None:
            yield Stream(raw, raw, compressed=False)
            return
        with lzma.LZMAFile(raw) as xz:
            yield Stream(xz, raw, compressed=True)
