"""The group of all ranks, and the small values that they exchange outside the steps."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from pipeline.config.sections import CheckpointConfig
from pipeline.run.world import World

T = TypeVar("T")

# For a rank that hangs; when one dies, its connections close and the other ranks notice at once. While training, the
# ranks wait longer for each other (`save_timeout`): one may be busy with a checkpoint.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@contextlib.contextmanager
def process_group(world: World, device: torch.device, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[None]:
    """Joins the process group of all ranks and destroys it at the end; a single process forms a group of its own."""
    if world.size > 1:
        world.export(os.environ)  # type: ignore[arg-type]
        store: dict[str, Any] = {"init_method": "env://"}
    else:
        store = {"store": HashStore(), "rank": 0, "world_size": 1}
        World().export(os.environ)  # type: ignore[arg-type]
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, timeout=timeout, **store)
    try:
        yield
    finally:
        _destroy_process_group()


def _destroy_process_group() -> None:
    """Destroys the group through DeepSpeed if that has joined it: its references would break the next group."""
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is None or comm.cdb is None:
        dist.destroy_process_group()
        return
    comm.destroy_process_group()
    setattr(comm, "cdb", None)  # noqa: B010 - a global of a module that is not typed


def set_timeout(timeout: timedelta) -> None:
    """Sets how long every group waits for a rank; DeepSpeed makes groups of its own, with PyTorch's ten minutes."""
    for one in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timeout, one)


def bind_device(device: torch.device) -> None:
    """Tells NCCL the device of this process, which it would otherwise guess in a barrier; call it after `preflight`.

    `init_process_group(device_id=...)` would connect all ranks at once, without a time limit, before `preflight` can
    name a rank that hangs.
    """
    if device.type == "cuda":
        dist.distributed_c10d._get_default_group().bound_device_id = device


def store() -> Store:
    """Returns the store that all ranks share without a collective, in any thread, while the group exists."""
    return dist.distributed_c10d._get_default_store()


def broadcast(value: T, world: World, timeout: timedelta = COLLECTIVE_TIMEOUT) -> T:
    """Returns rank 0's value on every rank; plain values only.

    The value travels through the store and needs no device: before `preflight` a device may hang.
    """
    if world.size == 1:
        return value
    number = store().add(f"broadcast/of_rank_{world.rank}", 1)
    key = f"broadcast/{number}"
    if world.is_first:
        store().set(key, pickle.dumps(value).hex())
        return value
    store().wait([key], timeout)
    # As PyTorch passes objects between ranks: from a process of this job, never from a file.
    return pickle.loads(bytes.fromhex(store().get(key).decode()))  # noqa: S301


def exchange(value: T, world: World, timeout: timedelta = COLLECTIVE_TIMEOUT) -> list[T]:
    """Returns the values of all ranks, in their order, on every rank; through the store, as `broadcast` does."""
    if world.size == 1:
        return [value]
    number = store().add(f"exchange/of_rank_{world.rank}", 1)
    keys = [f"exchange/{number}/{rank}" for rank in range(world.size)]
    store().set(keys[world.rank], pickle.dumps(value).hex())
    store().wait(keys, timeout)
    return [pickle.loads(bytes.fromhex(store().get(key).decode())) for key in keys]  # noqa: S301 - see `broadcast`


def save_timeout(config: CheckpointConfig) -> timedelta:
    """Returns how long to wait for a rank that may still be busy with a checkpoint."""
    return COLLECTIVE_TIMEOUT + timedelta(minutes=config.timeout_min)


def gather(value: T, world: World) -> list[T]:
    """Returns the values of all ranks, in the order of the ranks, on every rank; plain values only."""
    if world.size == 1:
        return [value]
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def barrier(world: World) -> None:
    """Waits for all ranks."""
    if world.size > 1:
        dist.barrier()
