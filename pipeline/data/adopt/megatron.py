"""Megatron-LM's indexed datasets: tokens in `NAME.bin`, sequences and documents in `NAME.idx`.

The index has 9 bytes of magic, the version (uint64), a code of the dtype (uint8), the numbers of sequences and of
document bounds (uint64); then the length of each sequence (int32), its first byte (int64) and the bounds of the
documents in sequences (int64): `megatron/core/datasets/indexed_dataset.py` of megatron-core 0.16.1.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.adopt.token_file import Ends, TokenFile, check_integers, whole_tokens
from pipeline.data.shard_maps import mapped
from pipeline.errors import DataError
from pipeline.files import fsync_file, naming, open_regular, size_of_regular

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
# It has no larger unsigned types; the bytes of an id are the same.
_MEGATRON_NAMES = {"uint32": "int32", "uint64": "int64"}
_AT_ONCE = 1 << 20


def open_megatron(path: Path) -> TokenFile:
    """Returns what the index beside a `.bin` file says of it.

    Raises:
        DataError: The index is missing, damaged, or does not describe the file.
    """
    index = path.with_suffix(".idx")
    with naming(index, "the index cannot be read", "a Megatron dataset is NAME.bin and NAME.idx", DataError):
        size = size_of_regular(index)
        with open_regular(index) as source:
            header = source.read(HEADER.size)
    if not header.startswith(MAGIC) or len(header) < HEADER.size:
        raise DataError(f"{index}: is no index of Megatron-LM (it does not begin with {MAGIC[:7].decode()})")
    _, version, code, sequences, bounds = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise DataError(f"{index}: has version {version} and dtype code {code}; this program reads version {VERSION}")
    dtype = check_integers(path, np.dtype(DTYPES[code]))
    expected = HEADER.size + 12 * sequences + 8 * bounds
    if size == expected + sequences:
        raise DataError(f"{index}: gives each sequence a mode; only text is read, in datasets without modes")
    if size != expected or bounds < 1:
        raise DataError(
            f"{index}: has {size:,} bytes; {sequences:,} sequences and {bounds:,} bounds of documents take {expected:,}"
        )
    tokens = whole_tokens(path, dtype)
    ends = functools.partial(_ends, index, sequences, bounds, tokens, dtype.itemsize)
    return TokenFile(path, dtype, 0, tokens, ends, index)


def write_index(path: Path, dtype: np.dtype[Any], starts: npt.NDArray[np.integer], offset: int) -> None:
    """Writes the index of a file of tokens, in which each document is one sequence.

    Args:
        path: The `.idx` file.
        dtype: Type of a token.
        starts: Where documents begin and, last, where the tokens end, in tokens from `offset`.
        offset: Bytes of the file before the first token.
    """
    code = {name: code for code, name in DTYPES.items()}[_MEGATRON_NAMES.get(dtype.name, dtype.name)]
    count = len(starts) - 1
    with path.open("wb") as out:
        out.write(HEADER.pack(MAGIC, VERSION, code, count, count + 1))
        for some in _pieces(count):
            out.write(np.diff(starts[some.start : some.stop + 1].astype(np.int64)).astype("<i4").tobytes())
        for some in _pieces(count):
            out.write(
                (offset + starts[some.start : some.stop].astype(np.int64) * dtype.itemsize).astype("<i8").tobytes()
            )
        for some in _pieces(count + 1):
            out.write(np.arange(some.start, some.stop, dtype="<i8").tobytes())
    fsync_file(path)


def _pieces(count: int) -> Iterator[range]:
    return (range(start, min(start + _AT_ONCE, count)) for start in range(0, count, _AT_ONCE))


def _ends(index: Path, sequences: int, bounds: int, tokens: int, item: int) -> Iterator[Ends]:
    """Checks the index against the file and yields where documents end, in tokens."""
    lengths = mapped(index, "<i4", HEADER.size, sequences)
    pointers = mapped(index, "<i8", HEADER.size + 4 * sequences, sequences)
    documents = mapped(index, "<i8", HEADER.size + 12 * sequences, bounds)
    place = 0
    for start in range(0, sequences, _AT_ONCE):
        some = np.asarray(lengths[start : start + _AT_ONCE], np.int64)
        expected = place + np.cumsum(some) * item
        found = np.append(pointers[start + 1 : start + 1 + len(some)], expected[-1:])[: len(some)]
        if pointers[start] != place or (some < 0).any() or (found != expected).any():
            raise DataError(f"{index}: the sequences from {start:,} on do not follow each other; the index is damaged")
        place = int(expected[-1])
    if place != tokens * item:
        raise DataError(f"{index}: its sequences have {place:,} bytes, and the file beside it has {tokens * item:,}")
    last = 0
    for start in range(0, bounds, _AT_ONCE):
        some = np.asarray(documents[start : start + _AT_ONCE])
        if (start == 0 and some[0] != 0) or some[0] < last or (np.diff(some) < 0).any() or some[-1] > sequences:
            raise DataError(f"{index}: the bounds of its documents are out of order from {start:,} on")
        last = int(some[-1])
        ends = np.full(len(some), tokens, np.int64)
        inside = some < sequences
        ends[inside] = pointers[some[inside]] // item
        yield ends[1:] if start == 0 else ends
    if last != sequences:
        raise DataError(f"{index}: its documents end at sequence {last:,} of {sequences:,}")
