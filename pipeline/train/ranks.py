"""What ranks tell each other outside the steps: small values, seldom."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

from pipeline.train.world import World

T = TypeVar("T")


def broadcast(value: T, world: World) -> T:
    """Rank 0's value, on every rank; plain values only."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T, world: World) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank; plain values only."""
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def barrier(world: World) -> None:
    """Waits for all ranks."""
    if world.size > 1:
        dist.barrier()
