"""The numbers of a step that all ranks agree on, and their way from the device to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Numbers:
    """What all ranks know about a step, by one all-reduce.

    Attributes:
        loss: Mean loss of the global batch.
        norm: Global L2 norm of the gradients before clipping.
        stop: Whether any rank was asked to stop.
    """

    loss: float
    norm: float
    stop: bool


class Agreed:
    """The numbers of a step on their way to the host.

    Args:
        numbers: Loss, norm and the number of ranks that were asked to stop, on the device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers, self._arrived = numbers, None
        if numbers.is_cuda:
            # Into pinned memory: a copy into any other holds the host up until the device has come this far.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Numbers:
        """The numbers; the host waits until the device has come to this step's clipping."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, stop = self._numbers.tolist()
        return Numbers(loss, norm, stop > 0)
