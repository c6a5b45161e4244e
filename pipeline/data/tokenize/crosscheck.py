"""Encodes a random sample of every slice again with Hugging Face's `tokenizers`; all ids must match."""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.read.documents import Documents, Offsets
from pipeline.data.tokenize.tokenizer import Ids, Tokenizer
from pipeline.errors import DataError

# The most text of a slice that is checked: tokenizers is about a hundred times slower than what it checks.
_DOCUMENTS = 16
_SAMPLE_BYTES = 32_000
# Only the beginning of a longer document is checked; both encoders encode it again.
_LONGEST = 16_000


@dataclass(frozen=True)
class _Excerpt:
    """A document, or the beginning of a long one, and the ids that the fast encoder gave it."""

    text: str
    ids: Ids
    size: int
    """Bytes that it counts for in the sample."""


class CrossCheck:
    """Collects the sample of one slice, the documents with the smallest random numbers, and compares it.

    Args:
        tokenizer: The encoder to check.
        seed: Seed of the random numbers.
        place: The slice, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, place: str) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)  # importing numpy's takes longer than a check
        self._place = place
        self._sample: list[tuple[float, int, _Excerpt]] = []
        self._count = 0

    def offer(self, documents: Documents, ids: Ids, offsets: Offsets) -> None:
        """Offers documents and their ids; some are kept until `finish`.

        Raises:
            DataError: The encoders disagree about a long document.
        """
        if self._tokenizer.encoder == "tokenizers" or not len(documents):
            return
        keys = np.array([self._random.random() for _ in range(len(documents))])
        for index in np.argsort(keys)[:_DOCUMENTS].tolist():
            key = -float(keys[index])
            if len(self._sample) == _DOCUMENTS and key <= self._sample[0][0]:
                break
            item = (key, self._count, self._excerpt(documents[index], ids[offsets[index] : offsets[index + 1]]))
            self._count += 1
            if len(self._sample) < _DOCUMENTS:
                heapq.heappush(self._sample, item)
            else:
                heapq.heapreplace(self._sample, item)

    def finish(self) -> int:
        """Compares the sample and returns the number of documents in it.

        Raises:
            DataError: The encoders disagree.
        """
        chosen: list[_Excerpt] = []
        size = 0
        for _, _, excerpt in sorted(self._sample, reverse=True):
            if chosen and size + excerpt.size > _SAMPLE_BYTES:
                continue
            size += excerpt.size
            chosen.append(excerpt)
        if chosen:
            self._compare(chosen)
        return len(chosen)

    def _excerpt(self, text: bytes, stored: Ids) -> _Excerpt:
        """Returns what is compared of a document; the stored ids of a long one must begin with those of its beginning.

        The text behind an excerpt can change the ids at its end, but hardly ever those of its first half. Where these
        differ, the whole document is compared.
        """
        if len(text) <= _LONGEST:
            return _Excerpt(text.decode(), stored.copy(), len(text))
        beginning = text[:_LONGEST].decode(errors="ignore")
        ids, _ = self._tokenizer.encode_batch(Documents.of([beginning.encode()]))
        half = len(ids) // 2
        if not np.array_equal(stored[:half], ids[:half]):
            self._compare([_Excerpt(text.decode(), stored, len(text))])
        return _Excerpt(beginning, ids.copy(), _LONGEST + 1)

    def _compare(self, chosen: Sequence[_Excerpt]) -> None:
        expected = self._tokenizer.reference_encode([excerpt.text for excerpt in chosen])
        for excerpt, reference in zip(chosen, expected, strict=True):
            found = excerpt.ids.tolist()
            if found != reference:
                raise DataError(_disagreement(self._place, self._tokenizer, excerpt.text, found, reference))


def _disagreement(place: str, tokenizer: Tokenizer, text: str, found: list[int], reference: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(found, reference, strict=False)) if a != b), min(len(found), len(reference))
    )
    return (
        f"{place}: {tokenizer.encoder} and tokenizers encode the document that begins {text[:60]!r} differently "
        f"from token {at}: {found[at : at + 5]} against {reference[at : at + 5]}; nothing was published. "
        "Please report the tokenizer.json and this text to gigatoken"
    )
