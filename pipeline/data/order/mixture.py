"""Divides samples among sources by weight, exactly over each block of samples."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pipeline.data.order.permutation import Int64s, derive_key, permute

# Number of samples in which a weighted mixture has exactly its shares. Large, for fine shares; the
# assignment of a whole block is computed at once (a few milliseconds, once per 65,536 samples).
MIXTURE_BLOCK = 1 << 16

_MIX = 2


def quotas(weights: Sequence[float], total: int = MIXTURE_BLOCK) -> list[int]:
    """Divides `total` by weight with the largest remainders, at least one for every weight above 0."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    counts = np.maximum(shares > 0, np.floor(shares * total)).astype(np.int64)
    remainders = shares * total - counts
    for index in np.argsort(-remainders, kind="stable")[: max(0, total - int(counts.sum()))]:
        counts[index] += 1
    # Sources too small for a whole unit got one, at the expense of the largest.
    counts[np.argmax(counts)] -= int(counts.sum()) - total
    return counts.tolist()


def mixture(samples: Int64s, weights: Sequence[float], key: int) -> tuple[Int64s, Int64s]:
    """Returns the source of each sample and the number of earlier samples of that source.

    In each block of `MIXTURE_BLOCK` samples every source has exactly its quota; the order inside is random. A source
    whose weight is 0 has no samples.
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


def mixture_counts(samples: int, weights: Sequence[float], key: int) -> Int64s:
    """Returns how many of the first `samples` samples each source has."""
    shares = tuple(quotas(weights))
    blocks, rest = divmod(samples, MIXTURE_BLOCK)
    source_of, _ = _mixture_block(blocks, shares, key)
    return blocks * np.asarray(shares, np.int64) + np.bincount(source_of[:rest], minlength=len(shares))


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
