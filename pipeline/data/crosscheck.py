"""A random sample of every slice is encoded a second time, by Hugging Face's `tokenizers`, and must match id for id."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from pipeline.data.text import Documents, Offsets
from pipeline.data.tokenizer import Ids, Tokenizer
from pipeline.errors import DataError

# At most this much text of a slice: tokenizers is some hundred times slower than what it checks.
_DOCUMENTS = 16
_SAMPLE_BYTES = 32_000
# Of a longer document its beginning is encoded by both.
_LONGEST = 16_000


class CrossCheck:
    """The sample of one slice: the documents with the smallest of keyed random numbers."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = np.random.default_rng(seed)
        self._sample: list[tuple[float, int, bytes, npt.NDArray[np.uint32] | None]] = []
        self._count = 0

    def offer(self, documents: Documents, ids: Ids, offsets: Offsets) -> None:
        """Documents and the ids they got; some may be kept until `finish`."""
        if self._tokenizer.encoder == "tokenizers" or not len(documents):
            return
        keys = self._random.random(len(documents))
        for index in np.argsort(keys)[:_DOCUMENTS].tolist():
            key = -float(keys[index])
            if len(self._sample) == _DOCUMENTS and key <= self._sample[0][0]:
                break
            text = documents[index]
            encoded = ids[offsets[index] : offsets[index + 1]].copy() if len(text) <= _LONGEST else None
            item = (key, self._count, text[: _LONGEST + 1], encoded)
            self._count += 1
            if len(self._sample) < _DOCUMENTS:
                heapq.heappush(self._sample, item)
            else:
                heapq.heapreplace(self._sample, item)

    def finish(self, place: str) -> int:
        """Compares.

        Returns:
            The documents that were compared.

        Raises:
            DataError: The encoders disagree.
        """
        chosen: list[tuple[str, npt.NDArray[np.uint32] | None]] = []
        size = 0
        for _, _, text, encoded in sorted(self._sample, reverse=True):
            if chosen and size + len(text) > _SAMPLE_BYTES:
                continue
            size += len(text)
            chosen.append((text[:_LONGEST].decode(errors="ignore") if encoded is None else text.decode(), encoded))
        if not chosen:
            return 0
        expected = self._tokenizer.reference_encode([words for words, _ in chosen])
        for (words, encoded), reference in zip(chosen, expected, strict=True):
            found = self._tokenizer.encode(words) if encoded is None else encoded.tolist()
            if found != reference:
                raise DataError(_disagreement(place, self._tokenizer, words, found, reference))
        return len(chosen)


def _disagreement(place: str, tokenizer: Tokenizer, text: str, found: list[int], reference: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(found, reference, strict=False)) if a != b), min(len(found), len(reference))
    )
    return (
        f"{place}: {tokenizer.encoder} and tokenizers encode the document that begins {text[:60]!r} differently, "
        f"from token {at} on: {found[at : at + 5]} against {reference[at : at + 5]}; nothing was published. "
        "Please report the tokenizer.json and this text to gigatoken"
    )
