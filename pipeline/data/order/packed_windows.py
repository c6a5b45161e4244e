"""Reads packed windows, which stand in for the windows of a stream of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.dataset import TokenStream
from pipeline.data.manifest import Shard
from pipeline.data.order.packing import DTYPES, Packing, packing_folder
from pipeline.data.shard_maps import mapped
from pipeline.errors import DataError
from pipeline.model.chunked_loss import IGNORED


class PackedWindows:
    """Consecutive packed windows of a dataset, of one source or of all.

    Args:
        dataset: The dataset folder.
        packing: Its index.
        stream: The tokens of the training split.
        source: The source whose windows these are; None for those of all.
    """

    def __init__(self, dataset: Path, packing: Packing, stream: TokenStream, source: str | None) -> None:
        self._folder = packing_folder(dataset, packing.window)
        maps = [np.asarray(mapped(self._folder / name, dtype)) for name, dtype in DTYPES.items()]
        self._begins, self._lengths, self._windows, self._filled = maps
        self._stream = stream
        self._spans: list[tuple[str, int, int]] = []
        self._first = end = 0
        for name, count in packing.windows.items():
            if source in (None, name):
                self._first = end if not self._spans else self._first
                self._spans.append((name, end - self._first, end - self._first + count))
            end += count

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards that hold the tokens of the split."""
        return self._stream.shards

    def gather(self, windows: npt.NDArray[np.int64], length: int) -> npt.NDArray[Any]:
        """Returns windows by their numbers: `(len(windows), length)` int64, where `IGNORED` is no token.

        Raises:
            DataError: The index points past the tokens.
        """
        rows = np.full((len(windows), length), IGNORED, np.int64)
        for row, filled, begin, tokens in self._pieces(windows):
            if begin + tokens > self._stream.tokens or filled + tokens > length:
                raise DataError(f"{self._folder}: is damaged; remove it and run `pipeline prepare CONFIG`")
            rows[row, filled : filled + tokens] = self._stream.gather(np.array([begin]), tokens)[0]
        return rows

    def document_begins(self, windows: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.bool_]:
        """Returns whether a piece begins at each of `length` places, `(len(windows), length)`; padding does too."""
        rows = np.ones((len(windows), length), np.bool_)
        for row, filled, _, tokens in self._pieces(windows):
            rows[row, filled + 1 : filled + tokens] = False
        return rows

    def _pieces(self, windows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int, int]]:
        """Yields the row, the place in it, the first token and the length of each piece of these windows."""
        for row, number in enumerate((windows + self._first).tolist()):
            filled = 0
            for piece in range(int(self._windows[number]), int(self._windows[number + 1])):
                tokens = int(self._lengths[piece])
                yield row, filled, int(self._begins[piece]), tokens
                filled += tokens

    def targets(self, windows: npt.NDArray[np.int64]) -> int:
        """Returns how many tokens these windows predict."""
        return int((self._filled[windows + self._first].astype(np.int64) - 1).sum())

    def locate(self, window: int) -> tuple[Shard, int]:
        """Returns the shard of a window's first token and its offset in that shard."""
        return self._stream.locate(int(self._begins[int(self._windows[window + self._first])]))

    def source_spans(self) -> list[tuple[str, int, int]]:
        """Returns the source of each stretch of windows, with its first window and the one after its last."""
        return self._spans
