"""Plain, gzip, Zstandard, bzip2 and xz files as one stream of bytes each."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, cast

Opener = Callable[[BinaryIO], IO[bytes]]


class DamagedArchiveError(Exception):
    """The archive ends early or its checksum is wrong."""


def _open_zstd(raw: BinaryIO) -> IO[bytes]:
    import zstandard

    # The library stops at the end of the first frame unless told otherwise.
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 31).stream_reader(
        raw, read_size=1 << 20, read_across_frames=True
    )
    return cast(IO[bytes], reader)


# gzip, bz2 and lzma read all the members of a file.
_OPENERS: dict[str, Opener] = {
    "gz": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    "bz2": lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    "xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115 - closed by open_stream
    "zst": _open_zstd,
}


@contextlib.contextmanager
def open_stream(path: str | Path, compression: str | None) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed; several members or frames are read one after the other."""
    with Path(path).open("rb", buffering=1 << 20) as raw:
        if compression is None:
            yield raw
            return
        with contextlib.closing(_OPENERS[compression](raw)) as stream:
            yield stream


def read_some(stream: IO[bytes], size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end of the stream.

    Raises:
        DamagedArchiveError: The archive ends early or is damaged.
    """
    pieces, missing = [], size
    while missing > 0:
        try:
            piece = stream.read(missing)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, ValueError, OSError) as error:
            raise _damage(error) from error
        except Exception as error:
            if type(error).__name__ != "ZstdError":  # not imported here: zstandard is loaded for .zst files only
                raise
            raise _damage(error) from error
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def skip(stream: IO[bytes], size: int, seekable: bool) -> None:
    """Moves `size` bytes on from the start."""
    if seekable:
        stream.seek(size, io.SEEK_SET)
        return
    while size > 0:
        piece = read_some(stream, min(size, 1 << 22))
        if not piece:
            return
        size -= len(piece)


def _damage(error: Exception) -> Exception:
    # An error of the disk is no damage of the archive: it must not be skipped as a bad record.
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return DamagedArchiveError(str(error) or type(error).__name__)
