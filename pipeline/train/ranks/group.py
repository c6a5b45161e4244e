"""The group of all ranks, and the small values that they exchange outside the steps."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from pipeline.config.train_sections import CheckpointConfig
from pipeline.errors import PipelineError
from pipeline.run.exchange import gather_values
from pipeline.run.world import World
from pipeline.train.ranks.hangs import record_collectives
from pipeline.train.ranks.rendezvous import meet

T = TypeVar("T")

# For a rank that hangs; when one dies, its connections close and the other ranks notice at once. While training, the
# ranks wait longer for each other (`save_timeout`): one may be busy with a checkpoint.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@contextlib.contextmanager
def process_group(
    world: World,
    device: torch.device,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    file: Path | None = None,
    stopped: Callable[[], str | None] = lambda: None,
) -> Iterator[Store]:
    """Joins the process group of all ranks and destroys it at the end; a single process forms a group of its own.

    Args:
        world: This process's place.
        device: Where it trains.
        timeout: How long the ranks wait for each other.
        file: Where they meet (`Run.meeting_file`); a single process needs none.
        stopped: Returns the signal that asks this process to stop, or None.

    Yields:
        The store that all ranks share.
    """
    world.export(os.environ)  # type: ignore[arg-type]
    backend = "gloo" if device.type == "cpu" else "nccl"
    with contextlib.ExitStack() as stack:
        shared: Store = HashStore()
        if world.size > 1:
            assert file is not None
            shared = stack.enter_context(contextlib.closing(meet(world, file, timeout, stopped)))
        record_collectives()
        with _ending_at_once():
            dist.init_process_group(backend, timeout=timeout, store=shared, rank=world.rank, world_size=world.size)
        stack.callback(_destroy_process_group)
        yield shared


@contextlib.contextmanager
def _ending_at_once() -> Iterator[None]:
    """Lets SIGTERM and SIGUSR2 end the process in the block: PyTorch connects the ranks and looks at no flag.

    The launcher takes a command that they end for one that was stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
    """Returns rank 0's value on every rank: a value of JSON, because nothing that is received is executed.

    The value travels through the store and needs no device: before `preflight` a device may hang.
    """
    if world.size == 1:
        return value
    number = store().add(f"broadcast/of_rank_{world.rank}", 1)
    key = f"broadcast/{number}"
    if world.is_first:
        store().set(key, json.dumps(value))
        return value
    store().wait([key], timeout)
    received: T = json.loads(store().get(key))
    return received


def on_first(work: Callable[[], Any], world: World, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Calls a function on the first rank, for which the other ranks wait; if it fails, all ranks raise its error."""
    problem: PipelineError | None = None
    if world.is_first:
        try:
            work()
        except PipelineError as error:
            problem = error
    failed = broadcast(None if problem is None else (str(problem), problem.exit_code), world, timeout)
    if failed is not None:
        raise problem or _FirstFailed(*failed)


class _FirstFailed(PipelineError):
    """What the first rank raised, as another rank raises it.

    Args:
        message: Its message.
        status: Its exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.exit_code = status


def save_timeout(config: CheckpointConfig) -> timedelta:
    """Returns how long to wait for a rank that may still be busy with a checkpoint."""
    return COLLECTIVE_TIMEOUT + timedelta(minutes=config.timeout_min)


def gather(value: T, world: World, timeout: timedelta | None = None) -> list[T]:
    """Returns the values of all ranks, in the order of the ranks, on every rank: values of JSON.

    Without a timeout the ranks wait for each other as long as in a collective.
    """
    if world.size == 1:
        return [value]
    return gather_values(store(), "gather", value, world.rank, world.size, timeout)


def barrier(world: World) -> None:
    """Waits for all ranks."""
    if world.size > 1:
        dist.barrier()
