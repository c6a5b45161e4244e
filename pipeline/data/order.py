"""Maps sample `n` of a run to its tokens, by pure functions: a resumed run needs no state but its step.

Sample `n` is row `n % batch_size` of global batch `n // batch_size`. A stream of `T` tokens holds
`W = (T - 1) // context_length` windows that do not overlap (a window needs one more token, for the last
target). An epoch draws every window of a stream once, in the order of a keyed permutation that is computed,
never stored. The `(T - 1) % context_length` tokens that fill no window are skipped in that epoch: less than
one window per stream. Each epoch shifts the first window by a keyed random part of them, so that the
unseen tokens differ from epoch to epoch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

# Number of samples in which a weighted mixture has exactly its shares. Large, for fine shares; the
# assignment of a whole block is computed at once (a few milliseconds, once per 65,536 samples).
MIXTURE_BLOCK = 1 << 16

_ROUNDS = 6
# An odd multiplier whose bits look random: 2**64 divided by the golden ratio.
_ODD, _HALF = np.uint64(0x9E3779B97F4A7C15), np.uint64(32)
_MASK = (1 << 64) - 1
_PERMUTE, _SHIFT, _MIX, _START, _SOURCE = range(5)


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


def quotas(weights: Sequence[float], total: int = MIXTURE_BLOCK) -> list[int]:
    """Divides `total` by weight with the largest remainders, at least one for every weight."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.maximum(1, np.floor(shares * total)).astype(np.int64)
    remainders = shares * total - counts
    for index in np.argsort(-remainders, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[index] += 1
    # Sources too small for a whole unit got one, at the expense of the largest.
    counts[np.argmax(counts)] -= int(counts.sum()) - total
    return counts.tolist()


def mixture(samples: Int64s, weights: Sequence[float], key: int) -> tuple[Int64s, Int64s]:
    """Returns the source of each sample and the number of earlier samples of that source.

    In each block of `MIXTURE_BLOCK` samples every source has exactly its quota; the order inside is random.
    """
    sources, draws = np.empty_like(samples), np.empty_like(samples)
    shares = tuple(quotas(weights))
    blocks = samples // MIXTURE_BLOCK
    for block in np.unique(blocks):
        here = blocks == block
        places = samples[here] - block * MIXTURE_BLOCK
        source_of, rank_of = _mixture_block(int(block), shares, key)
        sources[here] = source_of[places]
        draws[here] = block * np.asarray(shares, np.int64)[source_of[places]] + rank_of[places]
    return sources, draws


@functools.lru_cache(maxsize=4)
def _mixture_block(block: int, shares: tuple[int, ...], key: int) -> tuple[Int64s, Int64s]:
    """Returns the source of each place in a block, and its rank among the places of the same source."""
    shuffled = permute(np.arange(MIXTURE_BLOCK), MIXTURE_BLOCK, derive_key(key, _MIX, block))
    source_of = np.searchsorted(np.cumsum(shares), shuffled, side="right").astype(np.int64)
    by_source = np.argsort(source_of, kind="stable")
    first = np.cumsum([0, *shares[:-1]])
    rank_of = np.empty(MIXTURE_BLOCK, np.int64)
    rank_of[by_source] = np.arange(MIXTURE_BLOCK) - np.repeat(first, shares)
    return source_of, rank_of


@dataclass(frozen=True)
class Order:
    """The order of one run."""

    kind: Literal["shuffle", "random"]
    """`shuffle`: without replacement, epoch by epoch; `random`: at any offset, with replacement."""
    tokens: tuple[int, ...]
    """Number of tokens of each stream."""
    weights: tuple[float, ...] | None
    """Share of each stream; None if there is only one stream."""
    context_length: int
    """Tokens per window."""
    seed: int
    """Seed of the run."""

    @property
    def windows(self) -> tuple[int, ...]:
        """Number of windows per epoch of each stream."""
        return tuple((t - 1) // self.context_length for t in self.tokens)

    def draw(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Returns the stream of each sample and the offset at which its window begins.

        Args:
            samples: Sample numbers, counted from the start of the run.
        """
        if self.kind == "random":
            return self._draw_random(samples)
        if self.weights is None:
            sources, draws = np.zeros_like(samples), samples
        else:
            sources, draws = mixture(samples, self.weights, derive_key(self.seed))
        starts = np.empty_like(samples)
        for source in np.unique(sources):
            here = sources == source
            starts[here] = self._shuffled(int(source), draws[here])
        return sources, starts

    def epochs(self, samples: Int64s) -> Int64s:
        """Returns how many epochs of its stream precede each sample; 0 for `random`."""
        if self.kind == "random":
            return np.zeros_like(samples)
        if self.weights is None:
            return samples // self.windows[0]
        sources, draws = mixture(samples, self.weights, derive_key(self.seed))
        return draws // np.asarray(self.windows, np.int64)[sources]

    def _shuffled(self, source: int, draws: Int64s) -> Int64s:
        windows = self.windows[source]
        spare = (self.tokens[source] - 1) % self.context_length
        epochs = draws // windows
        starts = np.empty_like(draws)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            window = permute(
                draws[here] - epoch * windows, windows, derive_key(self.seed, _PERMUTE, source, int(epoch))
            )
            shift = derive_key(self.seed, _SHIFT, source, int(epoch)) % (spare + 1)
            starts[here] = window * self.context_length + shift
        return starts

    def _draw_random(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        if self.weights is None:
            sources = np.zeros_like(samples)
        else:
            bounds = np.cumsum(self.weights) / np.sum(self.weights)
            fractions = (self._words(samples, _SOURCE) >> np.uint64(11)) * 2.0**-53
            sources = np.minimum(np.searchsorted(bounds, fractions, side="right"), len(self.tokens) - 1).astype(
                np.int64
            )
        # The bias of the remainder is below tokens / 2**64.
        places = np.asarray(self.tokens, np.uint64)[sources] - np.uint64(self.context_length)
        return sources, (self._words(samples, _START) % places).astype(np.int64)

    def _words(self, samples: Int64s, purpose: int) -> UInt64s:
        return mix64(mix64(samples.astype(np.uint64)) + np.uint64(derive_key(self.seed, purpose)))


def sample_numbers(index: int, start: int, stop: int, batch_size: int) -> Int64s:
    """Returns the sample numbers of rows `[start, stop)` of global batch `index`."""
    return index * batch_size + np.arange(start, stop, dtype=np.int64)
