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
    """A part of a parameter and of its moments that this rank owns.

    Attributes:
        name: The parameter.
        shape: Shape of the whole parameter.
        start: First element of the part, in the flattened parameter.
        tensors: `weight`, `exp_avg`, `exp_avg_sq`: float32 views `(length,)`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]

    @property
    def length(self) -> int:
        """Its elements."""
        return self.tensors["weight"].numel()

    @property
    def dtype(self) -> str:
        """Of the weights, `float32` say."""
        return str(self.tensors["weight"].dtype).removeprefix("torch.")


class HostCopy:
    """Buffers for one rank's fragments, kept from one save to the next; the only place that knows CUDA's streams."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, fragments: list[OwnedFragment], ready: Any) -> dict[str, Tensor]:
        """Copies under their names in the file; they are overwritten by the next call.

        Args:
            fragments: What to copy.
            ready: `device_event` of the moment whose state is wanted.
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
    """On CUDA, an event after which the weights are those of this step; None on the CPU."""
    if not any(f.tensors["weight"].is_cuda for f in fragments):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def _copy_stream(fragments: list[OwnedFragment], ready: Any) -> Iterator[None]:
    """On CUDA, a stream of its own for the copies, finished when the block ends."""
    if ready is None:
        yield
        return
    # The current device is a thread's own: without its name this thread would wait for a stream of device 0.
    stream = torch.cuda.Stream(fragments[0].tensors["weight"].device)
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        yield
    stream.synchronize()
