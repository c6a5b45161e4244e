"""Before the first step all ranks name a bad node, and the job ends."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pipeline.files
from pipeline.config.load import load_config
from pipeline.errors import PipelineError
from pipeline.model.flops import num_parameters
from pipeline.run.folder import Run
from pipeline.run.provenance import IMAGE_SHA256_VARIABLE
from pipeline.run.world import World
from pipeline.train.ranks import group
from pipeline.train.ranks import preflight as module
from tests import processes

HOST = socket.gethostname()


def check(world: World, folder: str, injure: Callable[[], None] | None, dataset: str = "d") -> str:
    """Returns what preflight says on this rank; `injure` breaks rank 1."""
    module.MEET_LIMIT_S = 1.0
    if world.rank == 1 and injure is not None:
        injure()
    before = torch.get_rng_state()
    try:
        config = load_config("configs/demo.yaml")
        own = dataset if world.rank == 1 else "d"
        module.preflight(config, world, torch.device("cpu"), Run(Path(folder)), own)
    except (
        PipelineError,
        RuntimeError,
    ) as error:  # the latter on a late rank
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
        (advance_clock, "90 s ahead"),
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
    [(hang, "its checks"), (stay_away, "the sum over")],
)
def test_a_rank_that_hangs_is_named_within_the_time_limit(injure, words, tmp_path: Path):
    said = processes.on_ranks(check, 2, tmp_path / "log", str(tmp_path), injure)
    assert re.search(rf"rank 1 on {re.escape(HOST)}: .*{words}.* in 1 s", said[0])
    assert "rank 0" not in said[0]
    (event,) = events(tmp_path)
    assert event["nodes"] == [HOST]


def test_a_sum_that_does_not_end_is_reported_without_blaming_a_node(tmp_path: Path):
    said = processes.on_ranks(check, 2, tmp_path / "log", str(tmp_path), add_up_for_ever)
    # The first rank to give up closes its connections; the other may notice that before its own limit.
    assert any(re.search("sum over .*failed.* in 1 s", words) for words in said)
    assert events(tmp_path) == []


@pytest.mark.parametrize(
    ("skews", "wrong"),
    [
        ([0.1, 90.2], {1: 90.1}),
        ([90.0, 0.0, 0.0], {0: 90.0}),
        ([-30.0, None, 0.0], {0: -30.0}),
        ([60.0, 60.1, 60.2], {}),  # the file system's clock is the wrong one
        ([60.0], {}),
        ([None, None], {}),
    ],
)
def test_a_clock_is_wrong_if_most_other_clocks_and_the_file_systems_differ(skews, wrong):
    assert module._wrong_clocks(skews) == pytest.approx(wrong, abs=0.2)


@pytest.mark.parametrize(
    ("injure", "dataset", "words"),
    [
        (fill_disk, "d", "needs 0.02 GB; make room"),
        (change_image, "d", f"rank 1 on {HOST} .*image: f{{12}}, not none"),
        (None, "e" * 64, f"rank 1 on {HOST} .*dataset: e{{12}}, not d"),
    ],
)
def test_what_no_other_node_would_cure_is_reported_without_blaming_a_node(injure, dataset, words, tmp_path: Path):
    said = processes.on_ranks(check, 3, tmp_path / "log", str(tmp_path), injure, dataset)
    assert len(set(said)) == 1 and re.search(words, said[0])
    assert events(tmp_path) == []
    shutil.rmtree(tmp_path)


# ---- alone, in this process ------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    with group.process_group(World(), torch.device("cpu")):
        yield


def check_alone(folder: Path) -> str:
    return check(World(), str(folder), None)


def test_alone_a_healthy_rank_passes(alone: None, tmp_path: Path) -> None:
    assert check_alone(tmp_path) == "" and events(tmp_path) == []


@pytest.mark.parametrize("enough", [False, True])
def test_the_disk_must_hold_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: bool) -> None:
    """Weights and two moments in float32."""
    config = load_config("configs/demo.yaml")
    model = config.model
    needed = 12 * num_parameters(model)
    available = needed if enough else needed - 1
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=available))
    problems = module._disk_problems(config, Run(tmp_path))
    assert [str(tmp_path) in problem for problem in problems] == ([] if enough else [True])


def test_loading_the_devices_libraries_does_not_condemn_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances only in products: an hour in the first one, a second in the second."""
    now, costs, real = [0.0], iter([3600.0, 1.0]), module._product

    def product(*args: Any) -> torch.Tensor:
        now[0] += next(costs)
        return real(*args)

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(module, "_product", product)
    assert module._device_faults(torch.device("cpu")) == []
    assert next(costs, None) is None, "both products were computed"


def test_the_time_to_meet_grows_with_the_ranks() -> None:
    """NCCL connects them all within it."""
    assert module._limit_s(World(size=2)) < 61
    assert module._limit_s(World(size=4096)) > 400


def test_a_device_that_raises_or_is_slow_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert module._device_faults(cpu) == []
    times = iter([0.0, 10.0, 0.0, 11.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(times, 0.0)))
    assert module._device_faults(cpu) == []
    (fault,) = module._device_faults(cpu)
    assert "11 s" in fault

    def broken(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("device-side assert\nand many more lines")

    monkeypatch.setattr(torch.Tensor, "float", broken)
    (fault,) = module._device_faults(cpu)
    assert "device-side assert" in fault and "many more" not in fault


def test_a_fault_of_one_rank_and_a_problem_of_all_are_one_message_and_one_event(tmp_path: Path) -> None:
    """The same problem of several ranks is said once; the node is recorded by the first rank only."""
    findings = [module.Findings("a", problems=["no room"]), module.Findings("b", ["slow", "hot"], ["no room"])]
    for first in (False, True):
        with pytest.raises(PipelineError) as refused:
            module._judge(findings, World(rank=0 if first else 1, size=2), Run(tmp_path))
        assert str(refused.value).splitlines()[1:] == ["  rank 1 on b: slow; hot", "  no room"]
        assert [e["nodes"] for e in events(tmp_path)] == ([["b"]] if first else [])


def test_healthy_findings_are_let_through(tmp_path: Path) -> None:
    module._judge([module.Findings("a", skew=0.1), module.Findings("b", skew=0.2)], World(size=2), Run(tmp_path))


def test_a_clock_five_seconds_off_is_still_right() -> None:
    assert module._wrong_clocks([0.0, 0.0, 5.0]) == {}
    assert module._wrong_clocks([0.0, 0.0, -5.1]) == {2: -5.1}


def test_a_disk_that_takes_nothing_has_no_clock_to_compare(tmp_path: Path) -> None:
    assert module._skew_s(Run(tmp_path / "missing")) is None
    assert module._skew_s(Run(tmp_path)) == pytest.approx(0.0, abs=module.MAX_CLOCK_SKEW_S)
