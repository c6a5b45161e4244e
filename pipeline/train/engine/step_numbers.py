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
    profile: int = 0
    """Number of the profile that rank 0 was asked for last."""


def asked_of(stop: bool, profile: int, world_size: int) -> float:
    """Returns what this rank is asked, as one number; the sum over all ranks still tells both.

    One number more in the all-reduce of a step could change the order of its sums, and with it the last bit of a loss.

    Args:
        stop: Whether this rank was asked to stop.
        profile: Number of a profile, on rank 0; on the other ranks 0.
        world_size: Number of ranks.
    """
    return float(stop + profile * (world_size + 1))


class PendingNumbers:
    """The numbers of a step on their way to the host.

    Args:
        numbers: Loss, norm and the sum of what the ranks are asked (`asked_of`), on the device.
        world_size: Number of ranks.
    """

    def __init__(self, numbers: Tensor, world_size: int = 1) -> None:
        self._numbers, self._arrived, self._world_size = numbers, None, world_size
        if numbers.is_cuda:
            # Into pinned memory: a copy into pageable memory blocks the host until the device gets there.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True).copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Numbers:
        """Returns the numbers; the host waits until the device has clipped this step's gradients."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm, asked = self._numbers.tolist()
        profile, stops = divmod(int(asked), self._world_size + 1)
        return Numbers(loss, norm, stops > 0, profile)
