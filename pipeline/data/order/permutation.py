"""Keyed pseudo-random permutations that are computed, never stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_ROUNDS = 6
# An odd multiplier whose bits look random: 2**64 divided by the golden ratio.
_ODD, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_MASK = (1 << 64) - 1


def mix64(values: UInt64s) -> UInt64s:
    """Applies the finalizer of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that avalanches."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def derive_key(*parts: int) -> int:
    """Returns a 64-bit key that depends on every integer and its position."""
    state = 0
    for part in parts:
        state = _mix64_int((state + part + 0x9E3779B97F4A7C15) & _MASK)
    return state


def _mix64_int(value: int) -> int:
    """Applies `mix64` to one Python integer, at a tenth of numpy's cost."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def permute(positions: Int64s, size: int, key: int) -> Int64s:
    """Returns the images of `positions` under a pseudo-random permutation of `range(size)`.

    A Feistel network over the bits of `size`, whose halves differ by one bit if their number is odd, with cycle
    walking: a value outside the range is permuted again until it falls inside (Black and Rogaway 2002). Fewer than
    half of all values are outside.

    Args:
        positions: Any positions in `[0, size)`.
        size: Length of the permutation.
        key: Selects the permutation.
    """
    if size <= 1:
        return np.zeros_like(positions)
    bits = max(2, (size - 1).bit_length())
    keys = _round_keys(key)
    values = _feistel(positions.astype(np.uint64), bits, keys)
    while len(outside := np.flatnonzero(values >= size)):
        values[outside] = _feistel(values[outside], bits, keys)
    return values.astype(np.int64)


@functools.lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(derive_key(key, i)) for i in range(_ROUNDS))


def _feistel(values: UInt64s, bits: int, keys: Sequence[np.uint64]) -> UInt64s:
    low = bits - bits // 2
    left, right = values >> np.uint64(low), values & np.uint64((1 << low) - 1)
    # Each round swaps the halves and their widths; after an even number of rounds both are back.
    keep, other = np.uint64(64 - bits // 2), np.uint64(64 - low)
    for key in keys:
        word = (right + key) * _ODD
        word = (word ^ (word >> _HALF)) * _ODD
        left, right = right, left ^ (word >> keep)
        keep, other = other, keep
    return (left << np.uint64(low)) | right
