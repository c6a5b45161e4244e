"""Files of nothing but tokens: raw ones (nanoGPT, litgpt), OLMo's with their table of documents, and numpy's."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import tokenize
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.adopt.token_file import Ends, TokenFile, check_integers, whole_tokens
from pipeline.errors import DataError
from pipeline.files import is_regular, naming, open_regular

_NUMPY_MAGIC = b"\x93NUMPY"
_AT_ONCE = 1 << 16
_LONGEST_LINE = 1 << 20

# numpy parses the header as Python, which ends in one of these; a header has at most 10,000 characters.
_NO_HEADER = (KeyError, ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)


def open_raw(path: Path, dtype: np.dtype[Any]) -> TokenFile:
    """Returns a file that is tokens from its first byte to its last.

    Raises:
        DataError: It ends in the middle of a token, or begins like a file of another format.
    """
    with naming(path, "cannot be read", error=DataError), open_regular(path) as source:
        begins = source.read(len(_NUMPY_MAGIC))
    if begins == _NUMPY_MAGIC:
        raise DataError(f"{path}: begins with numpy's header; adopt it with the format npy")
    return TokenFile(path, dtype, 0, whole_tokens(path, dtype))


def open_olmo(path: Path, dtype: np.dtype[Any]) -> TokenFile:
    """Returns a raw file, with the documents of the `.csv.gz` beside it if there is one: start, end, id, source, line.

    The format is that of `dolma tokens`, whose files are called `.npy` and have no header.
    """
    found = open_raw(path, dtype)
    index = path.with_suffix(".csv.gz")
    if not index.exists():
        return found
    if not is_regular(index):
        raise DataError(f"{index}: is not a regular file")
    return TokenFile(path, dtype, 0, found.tokens, functools.partial(_ends, index, found.tokens), index)


def open_npy(path: Path) -> TokenFile:
    """Returns a file that `numpy.save` wrote.

    Raises:
        DataError: It is no such file, or its array has not one dimension of integers.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with naming(path, "cannot be read", error=DataError), open_regular(path) as source:
            version = np.lib.format.read_magic(source)
            shape, _, dtype = readers[version](source)
            offset = source.tell()
    except _NO_HEADER as error:
        raise DataError(
            f"{path}: has no header of numpy ({error}); raw tokens are adopted with the format raw, OLMo's with olmo"
        ) from error
    check_integers(path, dtype)
    if len(shape) != 1:
        raise DataError(f"{path}: its array has the shape {shape}; tokens have one dimension")
    tokens = whole_tokens(path, dtype, offset)
    if tokens != shape[0]:
        raise DataError(f"{path}: its header says {shape[0]:,} tokens, and it holds {tokens:,}")
    return TokenFile(path, dtype, offset, tokens)


def _ends(index: Path, tokens: int) -> Iterator[Ends]:
    """Yields the ends of the documents of a table, after checking that they follow each other."""
    last, ends, row = 0, [], 0
    try:
        with open_regular(index) as packed, gzip.open(packed) as content:
            text = io.TextIOWrapper(content, "utf-8", newline="")
            for row, fields in enumerate(csv.reader(iter(lambda: text.readline(_LONGEST_LINE), "")), 1):
                start, end = int(fields[0]), int(fields[1])
                if start != last or not start <= end <= tokens:
                    raise DataError(
                        f"{index}, row {row}: the document from {start:,} to {end:,} does not follow the one before, "
                        f"which ends at {last:,} of {tokens:,} tokens"
                    )
                last = end
                ends.append(end)
                if len(ends) == _AT_ONCE:
                    yield np.array(ends, np.int64)
                    ends = []
    except (OSError, EOFError, ValueError, IndexError, zlib.error, csv.Error) as error:
        raise DataError(f"{index}, row {max(1, row)}: cannot be read ({error})") from error
    if last != tokens:
        raise DataError(f"{index}: its documents end at {last:,}, and the file beside it has {tokens:,} tokens")
    yield np.array(ends, np.int64)
