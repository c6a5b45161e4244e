"""Reads the global batches of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pipeline.config.data_sections import DataConfig
from pipeline.data.dataset import Batch, TokenDataset, TokenStream, tensors
from pipeline.data.order.documents import Documents
from pipeline.data.order.draws import sample_numbers
from pipeline.data.order.packed_windows import PackedWindows
from pipeline.data.order.run_order import run_order
from pipeline.model.chunked_loss import IGNORED

_COUNTED_AT_ONCE = 1 << 20  # samples


class BatchReader:
    """The global batches of a run: each is a pure function of (seed, index), however ranks divide its rows.

    Args:
        dataset: The training split.
        data_config: Order, mixing and phases.
        seed: Seed of the run.
        context_length: Tokens per window.
        batch_size: Samples per global batch.
        document_starts: Whether a batch tells where the documents of its tokens start.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        data_config: DataConfig,
        *,
        seed: int,
        context_length: int,
        batch_size: int,
        document_starts: bool = False,
    ) -> None:
        self._documents = Documents(dataset) if document_starts else None
        self._batch_size = batch_size
        self._context_length = context_length
        manifest = dataset.manifest
        self.order, names, packing = run_order(
            dataset.path, manifest, data_config, seed=seed, context_length=context_length, batch_size=batch_size
        )
        self._padding = manifest.end_of_text_id if packing else None
        self._streams: Sequence[TokenStream | PackedWindows]
        sources = (None,) if self.order.weights is None else names
        if packing is not None:
            self._streams = [PackedWindows(dataset.path, packing, dataset.stream, source) for source in sources]
        else:
            by_source = dataset.source_streams()
            self._streams = [dataset.stream if source is None else by_source[source] for source in sources]

    def batch(self, index: int, start: int, stop: int) -> Batch:
        """Returns rows `[start, stop)` of global batch `index`, int64 on the CPU."""
        x, y = tensors(self._read(index, start, stop, lambda s, starts: s.gather(starts, self._context_length + 1)))
        if self._padding is not None:
            x.masked_fill_(x == IGNORED, self._padding)
        if self._documents is None:
            return x, y

        def begins() -> npt.NDArray[np.bool_]:
            return self._read(index, start, stop, lambda s, starts: s.document_begins(starts, self._context_length))

        return x, y, self._documents.starts(x, begins)

    def weight(self, index: int, start: int, stop: int) -> float | None:
        """Returns what the mean loss of rows `[start, stop)` counts, relative to the same rows without padding.

        The mean over micro-batches of loss times weight is the mean over the tokens of the global batch, however they
        divide its rows. None where nothing is padded.
        """
        if self._padding is None:
            return None
        mine, whole = self._targets(index, start, stop), self._targets(index, 0, self._batch_size)
        return mine * self._batch_size / (whole * (stop - start))

    def _targets(self, index: int, start: int, stop: int) -> int:
        sources, starts = self.order.draw(sample_numbers(index, start, stop, self._batch_size))
        packed = enumerate(cast("Sequence[PackedWindows]", self._streams))
        return sum(stream.targets(starts[sources == number]) for number, stream in packed)

    def _read(
        self, index: int, start: int, stop: int, read: Callable[[TokenStream | PackedWindows, Any], npt.NDArray[Any]]
    ) -> npt.NDArray[Any]:
        """Returns what is read of a stream at the starts of these rows, a row each."""
        sources, starts = self.order.draw(sample_numbers(index, start, stop, self._batch_size))
        if len(self._streams) == 1:
            return read(self._streams[0], starts)
        none = read(self._streams[0], starts[:0])
        rows = np.empty((stop - start, *none.shape[1:]), none.dtype)
        for source in np.unique(sources).tolist():
            here = sources == source
            rows[here] = read(self._streams[source], starts[here])
        return rows

    def describe(self, index: int, start: int, stop: int) -> list[dict[str, Any]]:
        """Returns the origin of rows `[start, stop)` of global batch `index`: shard, offset, source, epoch."""
        samples = sample_numbers(index, start, stop, self._batch_size)
        sources, starts = self.order.draw(samples)
        described = []
        for source, place, epoch in zip(
            sources.tolist(), starts.tolist(), self.order.epochs(samples).tolist(), strict=True
        ):
            shard, offset = self._streams[source].locate(place)
            described.append({"shard": shard.file, "offset": offset, "source": shard.source, "epoch": epoch})
        return described

    def count_sources(self, first: int, stop: int) -> dict[str, int]:
        """Returns the tokens of each source in the global batches `[first, stop)`, of which none needs to be read."""
        found = dict.fromkeys((shard.source for stream in self._streams for shard in stream.shards), 0)
        # Where a window begins is the number of a token or, if it is packed, of the window itself.
        width = self._context_length if self._padding is None else 1
        most = max(1, _COUNTED_AT_ONCE // self._batch_size)
        for index in range(first, stop, most):
            sources, starts = self.order.draw(
                sample_numbers(index, 0, (min(index + most, stop) - index) * self._batch_size, self._batch_size)
            )
            for number, stream in enumerate(self._streams):
                begins = starts[sources == number]
                for name, begin, end in stream.source_spans():
                    inside = np.clip(begins + width, begin, end) - np.clip(begins, begin, end)
                    found[name] += int(inside.sum()) * self._context_length // width
        return found
