"""What ranks tell each other outside the steps."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pipeline.config.train_sections import CheckpointConfig
from pipeline.run.world import World
from pipeline.train.ranks import group
from tests import processes

ALONE = World()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[HashStore]:
    """One store for ranks that are all in this process."""
    store = HashStore()
    monkeypatch.setattr(group, "store", lambda: store)
    yield store


def test_one_process_is_a_group_that_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with group.process_group(ALONE, torch.device("cpu")):
        assert (dist.get_world_size(), dist.get_rank(), dist.get_backend()) == (1, 0, "gloo")
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("0", "1", "0")
        group.store().set("key", "value")
        assert group.store().get("key") == b"value"
    assert not dist.is_initialized()
    with group.process_group(ALONE, torch.device("cpu")):
        assert not group.store().check(["key"]), "the next group starts afresh"


def test_the_group_ends_with_an_error_too() -> None:
    with pytest.raises(ZeroDivisionError), group.process_group(ALONE, torch.device("cpu")):
        raise ZeroDivisionError
    assert not dist.is_initialized()


@pytest.mark.parametrize("joined", [False, True])
def test_a_group_that_deepspeed_has_joined_is_destroyed_through_deepspeed(
    monkeypatch: pytest.MonkeyPatch, joined: bool
) -> None:
    destroyed: list[str] = []
    comm = SimpleNamespace(
        cdb=object() if joined else None, destroy_process_group=lambda: destroyed.append("deepspeed")
    )
    monkeypatch.setitem(sys.modules, "deepspeed.comm.comm", comm)  # type: ignore[arg-type]
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append("torch"))
    group._destroy_process_group()
    assert destroyed == (["deepspeed"] if joined else ["torch"])
    assert comm.cdb is None, "the next group is not mistaken for this one"


@pytest.mark.parametrize(("device", "bound"), [("cuda:3", torch.device("cuda", 3)), ("cpu", None)])
def test_only_a_gpu_is_bound_to_the_group(
    monkeypatch: pytest.MonkeyPatch, device: str, bound: torch.device | None
) -> None:
    default = SimpleNamespace(bound_device_id=None)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: default)
    group.bind_device(torch.device(device))
    assert default.bound_device_id == bound


def test_alone_a_value_is_its_own_answer() -> None:
    assert group.broadcast({"a": 1}, ALONE) == {"a": 1}
    assert group.gather("x", ALONE) == ["x"]
    group.barrier(ALONE)


def test_broadcasts_reach_every_rank_in_order(shared: HashStore) -> None:
    ranks = [World(rank=rank, size=3) for rank in range(3)]
    first, second = ["value", None, {"a": 0.5}], 2
    assert (group.broadcast(first, ranks[0]), group.broadcast(second, ranks[0])) == (first, second)
    for late in ranks[1:]:
        assert group.broadcast("its own", late) == first
        assert group.broadcast("its own", late) == second


def test_a_rank_waits_for_rank_0_no_longer_than_its_limit(shared: HashStore) -> None:
    with pytest.raises(RuntimeError, match="timeout|Timeout|timed out"):
        group.broadcast(None, World(rank=1, size=2), timedelta(milliseconds=50))


def test_a_rank_busy_with_a_checkpoint_is_given_its_time_limit_on_top() -> None:
    assert group.save_timeout(CheckpointConfig(timeout_min=7)) == group.COLLECTIVE_TIMEOUT + timedelta(minutes=7)
    assert timedelta(minutes=10) == group.COLLECTIVE_TIMEOUT


def meet(world: World) -> list[Any]:
    """Rank 1 is late; what it does before the barrier, rank 0 sees behind it."""
    if not world.is_first:
        time.sleep(0.3)
        group.store().set("late", "")
    group.barrier(world)
    seen = group.store().check(["late"])
    return [seen, group.gather(world.rank * 10, world), group.broadcast(f"from {world.rank}", world)]


def test_real_ranks_wait_for_each_other_and_gather_in_the_order_of_the_ranks(tmp_path: Path) -> None:
    assert processes.on_ranks(meet, 2, tmp_path / "log") == [[True, [0, 10], "from 0"]] * 2


def wait_for_a_save(world: World, allowed_s: float) -> str:
    """Rank 1 writes a checkpoint for three seconds; rank 0 waits for it, in a group like DeepSpeed's too."""
    others = dist.new_group(list(range(world.size)))
    group.set_timeout(timedelta(seconds=allowed_s))
    if not world.is_first:
        time.sleep(3)
    try:
        for one in (None, others):
            dist.all_reduce(torch.ones(1), group=one)
    except RuntimeError as error:
        return type(error).__name__
    return "trained"


@pytest.mark.parametrize(("allowed_s", "outcome"), [(1.0, "RuntimeError"), (60.0, "trained")])
def test_every_group_waits_for_a_rank_that_saves_as_long_as_the_config_allows(
    tmp_path: Path, allowed_s: float, outcome: str
) -> None:
    assert processes.on_ranks(wait_for_a_save, 2, tmp_path / "log", allowed_s)[0] == outcome
