"""A file of tokens as its format describes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError
from pipeline.files import naming, size_of_regular

Ends = npt.NDArray[np.int64]
"""Where documents end, in tokens from the start of the file; not decreasing."""

# Signed types are read as unsigned ones of the same width, once no value is negative.
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


@dataclass(frozen=True)
class TokenFile:
    """Where the tokens of a file are."""

    path: Path
    """The file, without links in its name."""
    dtype: np.dtype[Any]
    """Type of a token, as the file or the user says."""
    offset: int
    """Bytes before the first token."""
    tokens: int
    """Number of tokens."""
    ends: Callable[[], Iterator[Ends]] | None = None
    """Yields the ends of the documents, some at a time; None where only end-of-text tokens show them."""
    index: Path | None = None
    """The file that says where documents end."""

    @property
    def name(self) -> str:
        """The file as messages name it."""
        return str(self.path)


def whole_tokens(path: Path, dtype: np.dtype[Any], offset: int = 0) -> int:
    """Returns how many tokens a file holds behind its first `offset` bytes.

    Raises:
        DataError: It is no regular file, is empty, or ends in the middle of a token.
    """
    with naming(path, "cannot be read", error=DataError):
        size = size_of_regular(path) - offset
    if size <= 0:
        raise DataError(f"{path}: holds no tokens; leave it out")
    if size % dtype.itemsize:
        raise DataError(
            f"{path}: {size:,} bytes are no whole number of {dtype.name} tokens; "
            "the file is not complete, or has another dtype"
        )
    return size // dtype.itemsize


def check_integers(path: Path, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the type if tokens can have it.

    Raises:
        DataError: It is another type, or big-endian.
    """
    if dtype.name not in INTEGERS or dtype.newbyteorder("<") != dtype:
        raise DataError(f"{path}: holds {dtype.str} numbers; token ids are little-endian {', '.join(INTEGERS)}")
    return dtype
