"""Plain, gzip, Zstandard, bzip2 and xz files as one stream of bytes each."""

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

# What a decoder gives at once, and with it the most that is lost of what stands before damage.
_PIECE_BYTES = 1 << 18
# The disk is read in larger parts than the decoders take.
_BUFFER_BYTES = 1 << 20


class DamagedArchiveError(Exception):
    """The archive ends early, or a checksum in it is wrong.

    Attributes:
        lost: Bytes of the file that cannot be trusted, from the member that is damaged to the end; 0 where the
            file only ends early, for what is missing is not in it.
    """

    def __init__(self, reason: str, lost: int = 0) -> None:
        super().__init__(reason)
        self.lost = lost


class _Decoder(Protocol):
    """What decodes one member (gzip), frame (Zstandard) or stream (bzip2, xz), as Python's own decoders do."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """Python's zlib with the interface of its bz2 and lzma."""

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
    """The package zstandard with the interface of Python's bz2 and lzma; it cannot be told a length."""

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        # The most that the format allows: archives of `zstd --long` are no damaged ones.
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
    """How a kind of archive is read.

    Attributes:
        decoder: Makes a decoder for the next member.
        feed: Bytes that a decoder is given at once.
        padding: Zero bytes may follow a member in multiples of this.
    """

    decoder: Callable[[], _Decoder]
    feed: int = 1 << 16
    padding: int = 1


_CODECS = {
    "gz": _Codec(_Gzip),
    # Four bytes can hold 128 KB of equal characters, and all that was given is decoded at once: at most 128 MB.
    "zst": _Codec(_Zstandard, feed=1 << 12),
    "bz2": _Codec(bz2.BZ2Decompressor),
    "xz": _Codec(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4),
}


class Stream:
    """A file that is read from its start to its end.

    Attributes:
        compressed: Whether its content is not what is on the disk.
    """

    def __init__(self, raw: BinaryIO, compression: str | None = None) -> None:
        self.compressed = compression is not None
        self._raw = raw
        # One after the other from the start, whatever is asked for: what stands before damage must not depend on it.
        self._pieces = _unpacked(raw, _CODECS[compression]) if compression is not None else iter(())
        self._piece = b""
        self._damage: DamagedArchiveError | None = None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only before the end or before damage; none at the end.

        Raises:
            DamagedArchiveError: The archive is damaged here; every later call raises it again.
        """
        taken: list[bytes] = []
        missing = size
        while missing > 0 and (piece := self._some(missing)):
            taken.append(piece)
            missing -= len(piece)
        if self._damage is not None and not taken and size > 0:
            raise self._damage
        return taken[0] if len(taken) == 1 else b"".join(taken)

    def _some(self, most: int) -> bytes:
        if not self.compressed:
            return self._raw.read(most)
        if not self._piece and self._damage is None:
            try:
                self._piece = next(self._pieces, b"")
            except DamagedArchiveError as error:
                self._damage = error
        taken, self._piece = self._piece[:most], self._piece[most:]
        return taken

    def move_to(self, offset: int) -> None:
        """Goes to a byte of the content, from its start."""
        if not self.compressed:
            self._raw.seek(offset)
            return
        while offset > 0 and (piece := self._some(offset)):
            offset -= len(piece)

    @property
    def position(self) -> int:
        """Bytes of the file that were read, for progress displays."""
        return self._raw.tell()


@contextlib.contextmanager
def open_stream(path: str | Path, compression: str | None) -> Iterator[Stream]:
    """The content of a file, decompressed; several members or frames are read one after the other."""
    # No buffer in between for plain files: they are read in large pieces, each straight to its place.
    with Path(path).open("rb", buffering=0 if compression is None else _BUFFER_BYTES) as raw:
        yield Stream(raw, compression)


def _unpacked(raw: BinaryIO, codec: _Codec) -> Iterator[bytes]:
    """The content of all members, with each one's checksum checked at its end.

    Readers that take several members on their own differ in what they pass over: Arrow's goes on after an error
    with what it had before, for ever; Python's takes a damaged second stream of xz for something behind the archive.
    """
    size = os.fstat(raw.fileno()).st_size
    rest = raw.read(codec.feed)
    if not rest:
        raise DamagedArchiveError("the file is empty")
    while rest:
        member = raw.tell() - len(rest)
        rest = yield from _member(raw, codec, rest, size - member)
        rest = _behind_padding(raw, codec, rest)


def _member(raw: BinaryIO, codec: _Codec, packed: bytes, lost: int) -> Generator[bytes, None, bytes]:
    """Yields the content of one member; returns what was read behind it."""
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


def _behind_padding(raw: BinaryIO, codec: _Codec, rest: bytes) -> bytes:
    """What follows the zero bytes behind a member, with which archives are filled up on tapes and in blocks."""
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
