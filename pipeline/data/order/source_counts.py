"""How many tokens of each source a run has trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.order.batches import BatchReader


class SourceCounts:
    """Adds up the tokens of each source over the batches of a run, from the computed order.

    Args:
        reader: The batches.
        state: `state()` from the checkpoint that the run resumes from; None counts from the first batch.
    """

    def __init__(self, reader: BatchReader, state: Mapping[str, Any] | None = None) -> None:
        self._reader = reader
        self.restore(state)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Returns to what a checkpoint keeps; None to the first batch."""
        self._batches = int(state["batches"]) if state else 0
        self._tokens: dict[str, int] = dict(state["tokens"]) if state else {}

    def before(self, batch: int, skipped: Sequence[int] = ()) -> dict[str, int]:
        """Returns the tokens of each source in the batches before `batch`, without the skipped ones.

        Args:
            batch: Index of a global batch; no less than in the last call.
            skipped: Indices of batches that the run leaves out.
        """
        self._add(self._reader.count_sources(self._batches, batch), 1)
        for index in skipped:
            if self._batches <= index < batch:
                self._add(self._reader.count_sources(index, index + 1), -1)
        self._batches = max(self._batches, batch)
        return dict(self._tokens)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as plain values."""
        return {"batches": self._batches, "tokens": dict(self._tokens)}

    def _add(self, tokens: Mapping[str, int], sign: int) -> None:
        for name, count in tokens.items():
            self._tokens[name] = self._tokens.get(name, 0) + sign * count
