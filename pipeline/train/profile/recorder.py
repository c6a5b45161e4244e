"""Records some steps of one rank: a trace for Perfetto, and where memory went."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.files import fsync_file, write_bytes, write_text

_ALLOCATIONS = 200_000
_OPERATORS = 40


class Recorder:
    """What one rank does between `start` and `stop`.

    Args:
        folder: Where the files go.
        rank: This rank.
        device: Where it trains.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device) -> None:
        self._folder, self._rank, self._device = folder, rank, device
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True, profile_memory=True)
        self._step: Any = None

    def start(self) -> None:
        """Begins to record.

        Raises:
            OSError: The folder cannot be made.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS, device=self._device)
        self._profile.start()

    def begin_step(self, step: int) -> None:
        """Names what follows in the trace: the step that finishes as number `step + 1`."""
        self._end_step()
        self._step = record_function(f"step {step + 1}")
        self._step.__enter__()

    def stop(self) -> Callable[[], list[Path]]:
        """Ends the recording; returns the function that writes the files, which any thread may call."""
        self._end_step()
        self._profile.stop()
        snapshot = None
        if self._device.type == "cuda":
            snapshot = torch.cuda.memory._snapshot(self._device)
            torch.cuda.memory._record_memory_history(enabled=None, device=self._device)
        return lambda: [self._write_trace(), self._write_memory(snapshot)]

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _write_trace(self) -> Path:
        final = self._folder / f"trace_rank_{self._rank}.json.gz"
        with _staged(final) as temp:
            self._profile.export_chrome_trace(str(temp))
        return final

    def _write_memory(self, snapshot: Any) -> Path:
        if snapshot is not None:
            import pickle  # what PyTorch's viewer of snapshots reads; nothing here ever reads one

            final = self._folder / f"memory_rank_{self._rank}.pickle"
            write_bytes(final, pickle.dumps(snapshot))
            return final
        final = self._folder / f"memory_rank_{self._rank}.txt"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = self._profile.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=_OPERATORS)
        write_text(final, table)
        return final


@contextlib.contextmanager
def _staged(final: Path) -> Iterator[Path]:
    """Yields a path beside the final one, which it takes when the block succeeds."""
    temp = final.with_name(f".{final.name.removesuffix('.json.gz')}.{os.getpid()}.json.gz")
    try:
        yield temp
        fsync_file(temp)
        temp.replace(final)
    finally:
        temp.unlink(missing_ok=True)
