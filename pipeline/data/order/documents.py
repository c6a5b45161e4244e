"""Tells where the documents of a batch start, for attention within documents."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.dataset import TokenDataset


class Documents:
    """The documents of a dataset, known by the end-of-text tokens, or by the index if a source has none.

    Args:
        dataset: A split of it.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        manifest = dataset.manifest
        adopted = manifest.sources if manifest.adopted is not None else ()
        self._by_index = any(source["records"] and not source["ended_documents"] for source in adopted)
        self._end_of_text_id = manifest.end_of_text_id

    def starts(self, token_ids: torch.Tensor, begins: Callable[[], npt.NDArray[np.bool_]]) -> torch.Tensor:
        """Returns the place in its row at which the document of each token starts, `(rows, context)` int64.

        Args:
            token_ids: `(rows, context)` int64.
            begins: Reads from the index whether a document begins at each of them.
        """
        if self._by_index:
            return _starts(torch.from_numpy(begins()))
        return document_starts(token_ids, self._end_of_text_id)


def document_starts(token_ids: torch.Tensor, end_of_text_id: int) -> torch.Tensor:
    """Returns the place in its row at which the document of each token starts, `(rows, context)` int64.

    A row starts a document, and so does a token after an end-of-text token.
    """
    return _starts(torch.nn.functional.pad(token_ids[:, :-1] == end_of_text_id, (1, 0)))


def _starts(begins: torch.Tensor) -> torch.Tensor:
    places = torch.arange(begins.shape[1]).repeat(len(begins), 1)
    return places.masked_fill_(~begins, 0).cummax(dim=1).values
