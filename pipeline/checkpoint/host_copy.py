"""Copies of weights and moments in host memory, taken while the next step computes."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint.layout import KEYS
from pipeline.errors import CheckpointError
from pipeline.text_format import gigabytes

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, as PyTorch's own pinned memory is


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
    """One rank's slab of host memory, reused by every save; the only code here that knows CUDA."""

    def __init__(self) -> None:
        self._slab = torch.empty(0)
        self._views: dict[str, Tensor] = {}

    def reserve(self, fragments: list[OwnedFragment]) -> None:
        """Allocates memory for copies of these fragments, to the byte, unless it is there already.

        Raises:
            CheckpointError: The device's driver does not pin so much memory.
        """
        lengths = {_file_name(key, fragment): fragment.length for fragment in fragments for key in KEYS}
        if lengths == {name: view.numel() for name, view in self._views.items()}:
            return
        self._views = {}
        self._slab = torch.empty(0)  # the old one is unpinned and freed before the new one is allocated
        self._slab = torch.empty(sum(lengths.values()), dtype=torch.float32)
        if any(tensor.is_cuda for fragment in fragments for tensor in fragment.tensors.values()):
            _pin(self._slab)
        self._views = dict(zip(lengths, self._slab.split(list(lengths.values())), strict=True))

    def take(self, fragments: list[OwnedFragment], ready: Any) -> dict[str, Tensor]:
        """Returns copies of the fragments under their names in the rank's file; the next call overwrites them.

        Args:
            fragments: The fragments to copy.
            ready: The `device_event` after which the state to be saved is complete.
        """
        self.reserve(fragments)
        with _copy_stream(fragments, ready):
            for fragment in fragments:
                for key in KEYS:
                    source = fragment.tensors[key]
                    self._views[_file_name(key, fragment)].copy_(source.detach(), non_blocking=source.is_cuda)
        return self._views


def _file_name(key: str, fragment: OwnedFragment) -> str:
    return f"{key}/{fragment.name}"


def _pin(slab: Tensor) -> None:
    """Pins a tensor for as long as it lives.

    Not `pin_memory=True`: PyTorch's allocator of pinned memory rounds each request up to a power of two, which can
    double the host memory of a save, and never returns it to the system.
    """
    cudart, address = torch.cuda.cudart(), slab.data_ptr()
    status = int(cudart.cudaHostRegister(address, slab.nbytes, _PORTABLE))
    if status:
        raise CheckpointError(
            f"{gigabytes(slab.nbytes, 2)} of host memory for the copies of a save cannot be pinned (CUDA error "
            f"{status}); give the job more memory, or more ranks"
        )
    weakref.finalize(slab, cudart.cudaHostUnregister, address).atexit = False


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
