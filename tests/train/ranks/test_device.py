"""Which device a rank trains on, and what is known about its peak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import UsageError
from pipeline.run.world import World
from pipeline.train.ranks.device import peak_flops_per_s, pick_device
from tests.train.fakes import tiny_config


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A node that says it has four H100; returns the devices that were set."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    return chosen


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_rank_takes_the_gpu_of_its_place_on_the_node(gpus: list[torch.device], tmp_path: Path, wanted: str) -> None:
    config = tiny_config(tmp_path, **{"train.device": wanted})
    assert pick_device(config, World(rank=7, local_rank=3, size=8)) == torch.device("cuda", 3)
    assert gpus == [torch.device("cuda", 3)]


def test_a_rank_that_sees_fewer_gpus_than_ranks_wraps_around(gpus: list[torch.device], tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **{"train.device": "cuda"})
    assert pick_device(config, World(rank=5, local_rank=5, size=8)) == torch.device("cuda", 1)


def test_cpu_keeps_off_the_gpu(gpus: list[torch.device], tmp_path: Path) -> None:
    assert pick_device(tiny_config(tmp_path, **{"train.device": "cpu"}), World()) == torch.device("cpu")
    assert gpus == []


def test_auto_without_a_gpu_is_the_cpu(no_gpu: None, tmp_path: Path) -> None:
    assert pick_device(tiny_config(tmp_path, **{"train.device": "auto"}), World()) == torch.device("cpu")


def test_cuda_without_a_gpu_is_a_usage_error(no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.device"):
        pick_device(tiny_config(tmp_path, **{"train.device": "cuda"}), World())


def test_the_peak_is_known_for_known_gpus_only(gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops_per_s(torch.device("cpu")) is None
    peak = peak_flops_per_s(torch.device("cuda", 0))
    assert peak is not None and 9e14 < peak < 1e15
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an unheard-of device")
    assert peak_flops_per_s(torch.device("cuda", 0)) is None
