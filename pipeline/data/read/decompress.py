"""Reads plain, gzip, Zstandard, bzip2 and xz files as one stream of bytes each."""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

# The most that a decoder returns at once, and thus the most that is lost of the content before damage.
_PIECE_BYTES = 1 << 18
# Reads from disk are larger than what the decoders are given.
_BUFFER_BYTES = 1 << 20


class DamagedArchiveError(Exception):
    """The archive ends early, or a checksum in it is wrong."""

    def __init__(self, reason: str, lost: int = 0) -> None:
        super().__init__(reason)
        # Bytes of the file that cannot be trusted, from the damaged member to the end; 0 where the file only ends
        # early, since what is missing is not in it.
        self.lost = lost


class _Decoder(Protocol):
    """Decodes one member (gzip), frame (Zstandard) or stream (bzip2, xz) with the interface of bz2 and lzma."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """Gives zlib the interface of bz2 and lzma."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Zstandard:
    """Gives the package zstandard the interface of bz2 and lzma; it ignores `max_length`."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        # The most that the format allows, so that archives of `zstd --long` can be read.
        self._inner: Any = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()

    @property
    def eof(self) -> bool:
        return bool(self._inner.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._inner.unused_data)

    def decompress(self, data: bytes, _: int) -> bytes:
        import zstandard

        try:
            return bytes(self._inner.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True)
class _Codec:
    """How a kind of archive is read."""

    decoder: Callable[[], _Decoder]
    """Makes a decoder for the next member."""
    feed: int = 1 << 16
    """Bytes that a decoder is given at once."""
    padding: int = 1
    """Zero bytes may follow a member in multiples of this."""


_CODECS = {
    "gz": _Codec(_Gzip),
    # Four bytes can hold 128 KB of equal characters, and the decoder decodes all of its input at once: at most 128 MB.
    "zst": _Codec(_Zstandard, feed=1 << 12),
    "bz2": _Codec(bz2.BZ2Decompressor),
    "xz": _Codec(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4),
}


class Stream:
    """A file that is read from its start to its end."""

    def __init__(self, raw: BinaryIO, compression: str | None = None) -> None:
        self._compressed = compression is not None
        self._raw = raw
        # Pieces do not depend on the sizes that are read: neither may the content before damage.
        self._pieces = _unpacked(raw, _CODECS[compression]) if compression is not None else iter(())
        self._piece = b""
        self._damage: DamagedArchiveError | None = None

    def read(self, size: int) -> bytes:
        """Returns up to `size` bytes, fewer only before the end or before damage; none at the end.

        Raises:
            DamagedArchiveError: The archive is damaged here; every later call raises it again.
        """
        taken: list[bytes] = []
        missing = size
        while missing > 0 and (piece := self._read_some(missing)):
            taken.append(piece)
            missing -= len(piece)
        if self._damage is not None and not taken and size > 0:
            raise self._damage
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _read_some(self, most: int) -> bytes:
        if not self._compressed:
            return self._raw.read(most)
        if not self._piece and self._damage is None:
            try:
                self._piece = next(self._pieces, b"")
            except DamagedArchiveError as error:
                self._damage = error
        taken, self._piece = self._piece[:most], self._piece[most:]
        return taken

    def move_to(self, offset: int) -> None:
        """Moves from the start to a byte of the content."""
        if not self._compressed:
            self._raw.seek(offset)
            return
        while offset > 0 and (piece := self._read_some(offset)):
            offset -= len(piece)

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress displays."""
        return self._raw.tell()


@contextlib.contextmanager
def open_stream(path: str | Path, compression: str | None) -> Iterator[Stream]:
    """Opens the decompressed content of a file; several members or frames are read one after the other."""
    # No buffer for plain files: they are read in large pieces, each directly into its place.
    with Path(path).open("rb", buffering=0 if compression is None else _BUFFER_BYTES) as raw:
        yield Stream(raw, compression)


def _unpacked(raw: BinaryIO, codec: _Codec) -> Iterator[bytes]:
    """Yields the content of all members, with each one's checksum checked at its end.

    Libraries that read several members themselves hide damage in different ways: Arrow's reader returns what it had
    before an error again, forever; Python's takes a damaged second stream of xz for bytes behind the archive.
    """
    size = os.fstat(raw.fileno()).st_size
    rest = raw.read(codec.feed)
    if not rest:
        raise DamagedArchiveError("the file is empty")
    while rest:
        member = raw.tell() - len(rest)
        rest = yield from _member(raw, codec, rest, size - member)
        rest = _skip_padding(raw, codec, rest)


def _member(raw: BinaryIO, codec: _Codec, packed: bytes, lost: int) -> Generator[bytes, None, bytes]:
    """Yields the content of one member; returns the bytes that were read behind it."""
    decoder = codec.decoder()
    while not decoder.eof:
        if decoder.needs_input and not packed:
            packed = raw.read(codec.feed)
            if not packed:
                raise DamagedArchiveError("the file ends before the archive in it does")
        try:
            piece = decoder.decompress(packed, _PIECE_BYTES)
        except (zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            raise DamagedArchiveError(str(error) or type(error).__name__, lost) from error
        packed = b""
        if piece:
            yield piece
    return decoder.unused_data


def _skip_padding(raw: BinaryIO, codec: _Codec, rest: bytes) -> bytes:
    """Returns what follows the zero bytes behind a member, which fill archives up on tapes and in blocks."""
    zeros = 0
    while rest or (rest := raw.read(codec.feed)):
        left = rest.lstrip(b"\0")
        zeros += len(rest) - len(left)
        rest = left
        if rest:
            break
    if zeros % codec.padding:
        raise DamagedArchiveError(f"{zeros} zero bytes behind an archive, which must be a multiple of {codec.padding}")
    return rest
