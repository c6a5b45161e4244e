"""Many documents in one buffer: the unit that readers hand to the encoder without a copy a document."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """Documents `i` in `data[offsets[i]:offsets[i + 1]]`, UTF-8 (Arrow's layout of a string column).

    Attributes:
        data: The bytes; the first document may begin after byte 0.
        offsets: `(documents + 1,)`, not decreasing.
    """

    data: Bytes
    offsets: Offsets

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> Documents:
        """Joins separate byte strings."""
        offsets = np.zeros(len(documents) + 1, np.int64)
        np.cumsum([len(d) for d in documents], out=offsets[1:])
        return cls(np.frombuffer(b"".join(documents), np.uint8), offsets)

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

    def without(self, unwanted: npt.NDArray[np.bool_]) -> Documents:
        """The documents whose flag is not set."""
        return Documents.of([self[i] for i in np.flatnonzero(~unwanted).tolist()]) if unwanted.any() else self

    def hash_fractions(self) -> npt.NDArray[np.float64]:
        """A number in [0, 1) for each document that depends on nothing but its bytes."""
        view = self.data.data
        bounds = self.offsets.tolist()
        digests = b"".join(hashlib.blake2b(view[a:b], digest_size=8).digest() for a, b in itertools.pairwise(bounds))
        # 53 bits are what a float64 holds exactly, so that the comparison with a fraction is exact too.
        return np.asarray((np.frombuffer(digests, "<u8") >> np.uint64(11)) * 2.0**-53, np.float64)
