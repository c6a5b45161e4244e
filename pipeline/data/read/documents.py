"""Many documents in one buffer: what readers hand to the encoder without copying each document."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

_WHITE_SPACE = np.zeros(256, np.bool_)
_WHITE_SPACE[list(b" \t\n\r\x0b\x0c")] = True


@dataclass(frozen=True)
class Documents:
    """Texts of which number `i` is `data[offsets[i]:offsets[i + 1]]` (Arrow's layout of a string column)."""

    data: Bytes
    """The bytes; the first document may begin after byte 0."""
    offsets: Offsets
    """`(documents + 1,)`, not decreasing."""

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> Documents:
        """Joins separate byte strings into one buffer."""
        offsets = np.zeros(len(documents) + 1, np.int64)
        np.cumsum([len(d) for d in documents], out=offsets[1:])
        return cls(np.frombuffer(b"".join(documents), np.uint8), offsets)

    @classmethod
    def joined(cls, parts: Sequence[Documents]) -> Documents:
        """Concatenates the documents of several buffers."""
        if len(parts) == 1:
            return parts[0]
        lengths = [np.zeros(1, np.int64), *(p.lengths for p in parts)]
        data = [p.data[p.offsets[0] : p.offsets[-1]] for p in parts]
        return cls(np.concatenate(data) if data else np.zeros(0, np.uint8), np.cumsum(np.concatenate(lengths)))

    @classmethod
    def from_arrow(cls, column: Any) -> Documents:
        """Wraps an Arrow array of strings or bytes without nulls; the values are not copied."""
        import pyarrow

        if column.type not in (pyarrow.large_string(), pyarrow.large_binary()):
            column = column.cast(pyarrow.large_binary())
        _, offsets, data = column.buffers()
        if len(column) == 0 or offsets is None:
            return cls.of([])
        bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        return cls(np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8), bounds)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> Offsets:
        """Bytes of each document."""
        return np.diff(self.offsets)

    @property
    def text_bytes(self) -> int:
        """Bytes of all documents."""
        return int(self.offsets[-1] - self.offsets[0])

    def without(self, unwanted: Flags) -> Documents:
        """Returns the documents whose flag is not set."""
        if not unwanted.any():
            return self
        return Documents.of([self[i] for i in np.flatnonzero(~unwanted).tolist()])

    def is_utf8(self) -> bool:
        """Returns whether every document is valid UTF-8."""
        import pyarrow

        buffers = [None, pyarrow.py_buffer(self.offsets), pyarrow.py_buffer(self.data)]
        column = pyarrow.Array.from_buffers(pyarrow.large_string(), len(self), buffers)
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid:
            return False
        return True

    def blank(self) -> Flags:
        """Flags the documents that are nothing but ASCII white space."""
        flags = self.lengths == 0
        begins_white = np.zeros(len(self), np.bool_)
        begins_white[~flags] = _WHITE_SPACE[self.data[self.offsets[:-1][~flags]]]
        for index in np.flatnonzero(begins_white).tolist():
            flags[index] = not self[index].strip()
        return flags

    def hash_fractions(self) -> npt.NDArray[np.float64]:
        """Returns a number in [0, 1) for each document that depends only on its bytes, from their XXH3 of 64 bits."""
        from xxhash import xxh3_64_intdigest

        view = self.data.data
        hashes = [xxh3_64_intdigest(view[a:b]) for a, b in itertools.pairwise(self.offsets.tolist())]
        # 53 bits are what a float64 holds exactly, so that the comparison with a fraction is exact too.
        return np.asarray((np.array(hashes, np.uint64) >> np.uint64(11)) * 2.0**-53, np.float64)
