"""A bigram count model: the baseline that a trained model must clearly beat."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import TokenDataset

Codes = npt.NDArray[np.int64]

_PIECE = 1 << 20
_SMOOTHING = (1, 3, 10, 30, 100, 300, 1000, 3000)


def bigram_loss(
    train: TokenDataset, validation: TokenDataset, context_length: int, vocab_size: int, max_tokens: int = 100_000_000
) -> float:
    """Returns the loss of smoothed bigram counts of the training tokens, in nats per token.

    p(b | a) = (count(a, b) + s * p(b)) / (count(a) + s), with the add-one unigram p(b) and the smoothing s that is
    best *on the validation tokens themselves*: the baseline gets every advantage.

    Args:
        train: Where the counts come from.
        validation: Scored on the targets of its windows, which are the tokens that a model is scored on.
        context_length: Length of those windows.
        vocab_size: Number of token ids.
        max_tokens: At most this many of the first training tokens are counted.
    """
    scored = (len(validation) - 1) // context_length * context_length + 1
    pairs, times = np.unique(np.concatenate(list(_pairs(validation, vocab_size, scored))), return_counts=True)
    pair_counts = np.zeros(len(pairs), dtype=np.int64)
    token_counts = np.ones(vocab_size, dtype=np.int64)
    first_counts = np.zeros(vocab_size, dtype=np.int64)
    for codes in _pairs(train, vocab_size, min(len(train), max_tokens)):
        found = np.searchsorted(pairs, codes)
        known = pairs[np.minimum(found, len(pairs) - 1)] == codes
        pair_counts += np.bincount(found[known], minlength=len(pairs))
        first_counts += np.bincount(codes // vocab_size, minlength=vocab_size)
        token_counts += np.bincount(codes % vocab_size, minlength=vocab_size)
    unigram = (token_counts / token_counts.sum())[pairs % vocab_size]
    firsts = first_counts[pairs // vocab_size]
    return min(
        float(-(times * np.log((pair_counts + s * unigram) / (firsts + s))).sum() / times.sum()) for s in _SMOOTHING
    )


def _pairs(dataset: TokenDataset, vocab_size: int, tokens: int) -> Iterator[Codes]:
    """Yields every pair of adjacent tokens in the first `tokens` as one number, `first * vocab_size + second`."""
    for start in range(0, tokens - 1, _PIECE):
        length = min(_PIECE, tokens - 1 - start) + 1
        piece: npt.NDArray[Any] = dataset.stream.gather(np.array([start]), length)[0].astype(np.int64)
        yield piece[:-1] * vocab_size + piece[1:]
