"""Before the first step a bad node is named, on all ranks, and the job ends."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pipeline.files
from pipeline.config.load import load_config
from pipeline.errors import PipelineError
from pipeline.run.folder import Run
from pipeline.run.provenance import IMAGE_SHA256_VARIABLE
from pipeline.run.world import World
from pipeline.train.ranks import preflight as module
from tests import processes

HOST = socket.gethostname()


def check(world: World, folder: str, injure: Callable[[], None] | None, dataset: str = "d") -> str:
    """What preflight says on this rank; `injure` makes rank 1 a bad one."""
    module.MEET_LIMIT_S = 1.0
    if world.rank == 1 and injure is not None:
        injure()
    before = torch.get_rng_state()
    try:
        config = load_config("configs/demo.yaml")
        own = dataset if world.rank == 1 else "d"
        module.preflight(config, world, torch.device("cpu"), Run(Path(folder)), own)
    except (PipelineError, RuntimeError) as error:  # the latter: it comes late, and the others are gone
        return str(error)
    finally:
        assert torch.equal(torch.get_rng_state(), before)
    return ""


def break_device() -> None:
    real = torch.Tensor.float

    def off_by_one(self: torch.Tensor) -> torch.Tensor:
        wide = real(self)
        wide[0, 0] += 1
        return wide

    torch.Tensor.float = off_by_one  # type: ignore[method-assign]


def hang() -> None:
    def never(device: torch.device) -> list[str]:
        time.sleep(3)
        return []

    module._device_faults = never


def advance_clock() -> None:
    real = time.time
    pipeline.files.time = SimpleNamespace(time=lambda: real() + 90)  # type: ignore[assignment]


def stay_away() -> None:
    def never(where: str, world: World) -> None:
        if where == "adding":
            time.sleep(3)

    real, module._arrive = module._arrive, lambda where, world: (never(where, world), real(where, world))[1]


def add_up_for_ever() -> None:
    module.dist = SimpleNamespace(all_reduce=lambda ones: time.sleep(3))  # type: ignore[assignment]


def fill_disk() -> None:
    module.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1000))  # type: ignore[assignment]


def change_image() -> None:
    import os

    os.environ[IMAGE_SHA256_VARIABLE] = "f" * 64


def events(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_healthy_ranks_say_nothing(tmp_path: Path):
    assert processes.on_ranks(check, 2, tmp_path / "log", str(tmp_path), None) == ["", ""]
    assert events(tmp_path) == []


@pytest.mark.parametrize(
    ("injure", "words"),
    [
        (break_device, "multiplies matrices wrongly"),
        (advance_clock, "its clock is 90 s ahead"),
    ],
)
def test_a_bad_node_is_named_on_all_ranks_and_recorded(injure, words, tmp_path: Path):
    said = processes.on_ranks(check, 2, tmp_path / "log", str(tmp_path), injure)
    assert said[0] == said[1]
    assert f"rank 1 on {HOST}" in said[0] and words in said[0]
    assert "rank 0" not in said[0]
    (event,) = events(tmp_path)
    assert event["event"] == "bad_node" and event["nodes"] == [HOST]


@pytest.mark.parametrize(
    ("injure", "words"),
    [(hang, "did not get through its checks"), (stay_away, "did not join the sum over all ranks")],
)
def test_a_rank_that_hangs_is_named_within_the_time_limit(injure, words, tmp_path: Path):
    said = processes.on_ranks(check, 2, tmp_path / "log", str(tmp_path), injure)
    assert f"rank 1 on {HOST}: {words} in 1 s" in said[0]
    assert "rank 0" not in said[0]
    (event,) = events(tmp_path)
    assert event["nodes"] == [HOST]


def test_a_sum_that_does_not_end_is_said_and_blames_nobody(tmp_path: Path):
    said = processes.on_ranks(check, 2, tmp_path / "log", str(tmp_path), add_up_for_ever)
    # The first rank that gives up closes its connections, which is what the other may see instead of its own limit.
    assert any("a sum over all ranks failed: it did not end in 1 s" in words for words in said)
    assert events(tmp_path) == []


@pytest.mark.parametrize(
    ("skews", "wrong"),
    [
        ([0.1, 90.2], {1: 90.1}),
        ([90.0, 0.0, 0.0], {0: 90.0}),
        ([-30.0, None, 0.0], {0: -30.0}),
        ([60.0, 60.1, 60.2], {}),  # the file system's clock is wrong
        ([60.0], {}),
        ([None, None], {}),
    ],
)
def test_a_clock_is_wrong_if_most_others_and_the_file_systems_say_so(skews, wrong):
    assert module._wrong_clocks(skews) == pytest.approx(wrong, abs=0.2)


@pytest.mark.parametrize(
    ("injure", "dataset", "words"),
    [
        (fill_disk, "d", "a checkpoint needs 0.02 GB; make room"),
        (change_image, "d", f"rank 1 on {HOST} has another image: ffffffffffff, not none"),
        (None, "e" * 64, f"rank 1 on {HOST} has another dataset: eeeeeeeeeeee, not d"),
    ],
)
def test_what_another_node_would_not_cure_is_said_and_no_node_is_blamed(injure, dataset, words, tmp_path: Path):
    said = processes.on_ranks(check, 3, tmp_path / "log", str(tmp_path), injure, dataset)
    assert len(set(said)) == 1 and words in said[0]
    assert events(tmp_path) == []
    shutil.rmtree(tmp_path)
