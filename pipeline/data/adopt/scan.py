"""Reads every token of a piece once: hashes it, checks the ids, and finds or checks the ends of its documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.adopt.pieces import Piece
from pipeline.data.shard_maps import mapped
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.errors import DataError
from pipeline.files import open_regular

_READ_BYTES = 8 << 20
# Fewer tokens may look like those of a wider type by chance.
_ENOUGH_FOR_A_PATTERN = 256


@dataclass(frozen=True)
class Scanned:
    """What a scan found."""

    sha256: str
    """Digest of the tokens."""
    index_sha256: str
    """Digest of the index."""
    largest_id: int
    """Largest token id."""
    text_bytes: int
    """UTF-8 bytes of the text, as the widths of the tokens say."""
    ended: int
    """Documents whose last token is the end-of-text token."""
    inner_ends: int
    """End-of-text tokens anywhere else."""


def scan(piece: Piece, tokenizer: Tokenizer, widths: npt.NDArray[Any], on_read: Callable[[int], None]) -> Scanned:
    """Scans a piece in bounded memory.

    Args:
        piece: What to read.
        tokenizer: Whose ids the tokens are.
        widths: Bytes of text per token id.
        on_read: Told the bytes of each read; what it raises ends the scan.

    Raises:
        DataError: The file is shorter than it was, or a token cannot be the tokenizer's; the message names the place.
    """
    file, end_id = piece.file, tokenizer.end_of_text_id
    indexed = file.ends is not None
    index_sha256 = piece.index.finish(piece.stop - piece.start) if indexed else ""
    ends = mapped(piece.index.path, "<u8")[1:] if indexed else np.zeros(0, "<u8")
    digest = hashlib.sha256()
    largest = text_bytes = ended = all_ends = 0
    wide, narrow = _wider_type(file.dtype, tokenizer.vocab_size), False
    place = piece.start
    with open_regular(file.path) as source:
        source.seek(file.offset + place * file.dtype.itemsize)
        while place < piece.stop:
            content = source.read(min(_READ_BYTES, (piece.stop - place) * file.dtype.itemsize))
            if not content or len(content) % file.dtype.itemsize:
                raise DataError(f"{file.name}: ends at token {place:,} of {file.tokens:,}; it was changed meanwhile")
            ids = np.frombuffer(content, file.dtype)
            digest.update(content)
            largest = max(largest, _largest(ids, file.name, place, tokenizer))
            at = np.flatnonzero(ids == end_id)
            all_ends += len(at)
            if indexed:
                first, last = np.searchsorted(ends, [place - piece.start + 1, place - piece.start + len(ids) + 1])
                final = ends[first:last].astype(np.int64) - (place - piece.start) - 1
                ended += int(np.count_nonzero(ids[final] == end_id))
            else:
                piece.index.add(at + (place - piece.start + 1))
                ended += len(at)
            text_bytes += int(widths[ids].sum(dtype=np.int64))
            narrow = narrow or wide is None or bool((_read_as(wide, ids, place) >= tokenizer.vocab_size).any())
            place += len(ids)
            on_read(len(content))
    if not narrow and piece.stop - piece.start >= _ENOUGH_FOR_A_PATTERN:
        raise DataError(
            f"{file.name}: read as {wide}, it holds ids of the tokenizer too; the tokens are probably of a wider type "
            f"than {file.dtype.name}: correct --dtype, or the header of the file that says it"
        )
    if not indexed:
        index_sha256 = piece.index.finish(piece.stop - piece.start)
    return Scanned(digest.hexdigest(), index_sha256, largest, text_bytes, ended, all_ends - ended)


def _wider_type(dtype: np.dtype[Any], vocab_size: int) -> np.dtype[Any] | None:
    """Returns the narrowest type that is wider and holds every id of the tokenizer; None if there is none."""
    types = (np.dtype(f"<u{size}") for size in (2, 4, 8))
    return next((t for t in types if t.itemsize > dtype.itemsize and vocab_size - 1 <= np.iinfo(t).max), None)


def _read_as(wide: np.dtype[Any], ids: npt.NDArray[Any], place: int) -> npt.NDArray[Any]:
    """Returns the whole numbers of a wider type among tokens, of which the first is token `place` of its file."""
    count = wide.itemsize // ids.itemsize
    whole = ids[-place % count :]
    return whole[: len(whole) // count * count].view(wide)


def _largest(ids: npt.NDArray[Any], name: str, place: int, tokenizer: Tokenizer) -> int:
    largest, smallest = int(ids.max()), int(ids.min())
    if smallest >= 0 and largest < tokenizer.vocab_size:
        return largest
    at = int(np.argmin(ids) if smallest < 0 else np.argmax(ids >= tokenizer.vocab_size))
    raise DataError(
        f"{name}: token {place + at:,} (from 0) has the id {ids[at]}, and the tokenizer has {tokenizer.vocab_size:,}; "
        "the tokenizer.json or the dtype is not that of these files"
    )
