"""Copies of weights and moments in host memory, taken while the next step computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.layout import KEYS


@dataclass(frozen=True)
class OwnedFragment:
    """A part of a parameter and of its moments that this rank owns."""

    name: str
    """Name of the parameter."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    """First element of the part, in the flattened parameter."""
    tensors: dict[str, Tensor]
    """`weight`, `exp_avg`, `exp_avg_sq`: float32 views `(length,)`."""

    @property
    def length(self) -> int:
        """Number of elements in the part."""
        return self.tensors["weight"].numel()

    @property
    def dtype(self) -> str:
        """Dtype of the weights, for example `float32`."""
        return str(self.tensors["weight"].dtype).removeprefix("torch.")


class HostCopy:
    """One rank's buffers in host memory, reused by every save; the only code here that knows CUDA streams."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, fragments: list[OwnedFragment], ready: Any) -> dict[str, Tensor]:
        """Returns copies of the fragments under their names in the rank's file; the next call overwrites them.

        Args:
            fragments: The fragments to copy.
            ready: The `device_event` after which the state to be saved is complete.
        """
        with _copy_stream(fragments, ready):
            for fragment in fragments:
                for key in KEYS:
                    source = fragment.tensors[key]
                    name = f"{key}/{fragment.name}"
                    if name not in self._buffers or self._buffers[name].numel() != source.numel():
                        self._buffers[name] = torch.empty(source.numel(), pin_memory=source.is_cuda)
                    self._buffers[name].copy_(source.detach(), non_blocking=source.is_cuda)
        return self._buffers


def device_event(fragments: list[OwnedFragment]) -> Any:
    """Returns, on CUDA, an event after which the weights are those of this step; None on the CPU."""
    if not any(f.tensors["weight"].is_cuda for f in fragments):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def _copy_stream(fragments: list[OwnedFragment], ready: Any) -> Iterator[None]:
    """Runs the block's copies on their own CUDA stream and waits for them at its end; does nothing on the CPU."""
    if ready is None:
        yield
        return
    # The current device is set per thread: without this name the thread would wait for a stream of device 0.
    stream = torch.cuda.Stream(fragments[0].tensors["weight"].device)
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        yield
    stream.synchronize()
