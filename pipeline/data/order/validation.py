"""Reads the windows on which a run is validated."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch.nn import functional

from pipeline.data.dataset import Batch, TokenDataset, TokenStream, tensors
from pipeline.data.order.documents import Documents
from pipeline.data.order.run_order import refuse_unfit_validation
from pipeline.model.chunked_loss import IGNORED


class ValidationWindows:
    """The windows of one source: side by side from its first token, without what follows the last whole one.

    A source that is shorter than a window has one, whose last targets are ignored.

    Args:
        name: Name of the source.
        stream: Its tokens.
        context_length: Tokens per window.
        documents: Tells the documents apart; None if a batch need not say where they start.
    """

    def __init__(self, name: str, stream: TokenStream, context_length: int, documents: Documents | None = None) -> None:
        self._documents = documents
        self.name = name
        self.tokens = stream.tokens
        """Tokens of the source."""
        self.bytes = stream.bytes
        """UTF-8 bytes of their text."""
        self._stream = stream
        self._context_length = context_length
        self.count = max(1, (stream.tokens - 1) // context_length)

    def targets(self, start: int, stop: int) -> int:
        """Returns how many tokens windows `[start, stop)` predict."""
        return min((stop - start) * self._context_length, self.tokens - 1)

    def batch(self, start: int, stop: int) -> Batch:
        """Returns windows `[start, stop)`, int64 on the CPU."""
        starts = np.arange(start, min(stop, self.count), dtype=np.int64) * self._context_length
        length = min(self._context_length + 1, self._stream.tokens)
        x, y = tensors(self._stream.gather(starts, length))
        missing = (0, self._context_length + 1 - length)
        x, y = functional.pad(x, missing), functional.pad(y, missing, value=IGNORED)
        if self._documents is None:
            return x, y

        def begins() -> npt.NDArray[np.bool_]:
            return np.pad(self._stream.document_begins(starts, length - 1), ((0, 0), missing))

        return x, y, self._documents.starts(x, begins)


def validation_windows(
    dataset: TokenDataset, context_length: int, documents: bool = False
) -> tuple[ValidationWindows, ...]:
    """Returns the windows of each source of a split, in the order of the config.

    Args:
        dataset: The validation split.
        context_length: Tokens per window.
        documents: Whether a batch tells where the documents of its tokens start.

    Raises:
        DataError: The split is shorter than a window, or a source in it has nothing to predict.
    """
    refuse_unfit_validation(dataset.path, dataset.stream.shards, context_length)
    told_apart = Documents(dataset) if documents else None
    return tuple(
        ValidationWindows(name, stream, context_length, told_apart) for name, stream in dataset.source_streams().items()
    )
