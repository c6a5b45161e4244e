"""The numbers of a step that all ranks agree on, and their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """What all ranks know about a step, by one all-reduce."""

    loss: float
    """Mean loss of the global batch."""
    norm: float
    """Global L2 norm of the gradients before clipping."""
    stop: bool
    """Whether any rank was asked to stop."""


class PendingNumbers:
    """The numbers of a step on their way to the host.

    Args:
        numbers: Loss, norm and the number of ranks that were asked to stop, on the device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            # Into pinned memory: a copy into pageable memory blocks the host until the device gets there.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Numbers:
        """Returns the numbers; the host waits until the device has clipped this step's gradients."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, stop = self._numbers.tolist()
        return Numbers(loss, norm, stop > 0)
