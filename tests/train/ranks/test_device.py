"""Which device a rank trains on, and what is known about its peak."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pipeline.errors import PipelineError, UsageError
from pipeline.run.world import GPUS_VARIABLE, World
from pipeline.train.ranks import device as device_module
from pipeline.train.ranks.device import peak_flops_per_s, pick_device
from tests.train.fakes import tiny_config


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A node that says it has four H100; returns the devices that were set."""
    chosen: list[torch.device] = []
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "of the test")
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


def test_auto_in_a_job_with_gpus_that_pytorch_cannot_use_is_an_error_with_the_driver_s_words(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update\nmore")

    monkeypatch.setenv(GPUS_VARIABLE, "8")
    monkeypatch.setattr(torch.cuda, "init", too_old)
    config = tiny_config(tmp_path, **{"train.device": "auto"})
    with pytest.raises(
        PipelineError, match=r"8 GPUs per node, .*: The NVIDIA driver .* too old \(found version 11040\)"
    ):
        pick_device(config, World())
    assert pick_device(tiny_config(tmp_path, **{"train.device": "cpu"}), World()) == torch.device("cpu")


def test_cuda_without_a_gpu_is_a_usage_error(no_gpu: None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.device"):
        pick_device(tiny_config(tmp_path, **{"train.device": "cuda"}), World())


def test_mfu_is_measured_against_the_peak_of_the_arithmetic_in_use(gpus: list[torch.device]) -> None:
    device, matmul = torch.device("cuda", 0), torch.backends.cuda.matmul
    assert [peak_flops_per_s(device, precision) for precision in ("bf16", "fp32")] == [989e12, 67e12]
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        assert [peak_flops_per_s(device, precision) for precision in ("bf16", "fp32")] == [989e12, 494e12]
    finally:
        matmul.allow_tf32 = before


def test_the_peak_is_known_for_known_gpus_only(gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops_per_s(torch.device("cpu"), "bf16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an unheard-of device")
    assert peak_flops_per_s(torch.device("cuda", 0), "bf16") is None


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_of_device_memory_grow_unless_the_user_set_up_the_allocator(
    gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Set before this process touches the device, whoever launched it."""
    for variable in device_module._ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(os.environ.get("PYTORCH_ALLOC_CONF")))
    seen: list[str | None] = []
    config = tiny_config(tmp_path, **{"train.device": "cuda"})
    pick_device(config, World())
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:512")
    pick_device(config, World())
    own = "max_split_size_mb:512" if name == "PYTORCH_ALLOC_CONF" else None
    assert seen == ["expandable_segments:True", own]


def test_a_cpu_run_leaves_the_environment_alone(no_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    pick_device(tiny_config(tmp_path, **{"train.device": "auto"}), World())
    assert "PYTORCH_ALLOC_CONF" not in os.environ
