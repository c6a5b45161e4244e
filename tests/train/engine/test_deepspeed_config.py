"""What DeepSpeed is told: our settings, and the user's where we have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.run.world import World
from pipeline.train.engine.deepspeed_config import deepspeed_config
from tests.train.fakes import tiny_config

BATCH = {"train.batch_size": 16, "train.micro_batch_size": 2}


def settings(folder: Path, world: int = 1, **changes: Any) -> dict[str, Any]:
    return deepspeed_config(tiny_config(folder, **(BATCH | changes)), World(size=world))


@pytest.mark.parametrize(("world", "accumulated"), [(1, 8), (2, 4), (8, 1)])
def test_ranks_and_accumulated_micro_batches_make_up_the_global_batch(
    tmp_path: Path, world: int, accumulated: int
) -> None:
    told = settings(tmp_path, world)
    assert told["train_batch_size"] == 16
    assert told["train_micro_batch_size_per_gpu"] == 2
    assert told["gradient_accumulation_steps"] == accumulated


def test_deepspeed_neither_clips_nor_replaces_our_optimizer(tmp_path: Path) -> None:
    told = settings(tmp_path)
    assert told["gradient_clipping"] == 0.0
    assert told["zero_allow_untested_optimizer"] is True and told["zero_force_ds_cpu_optimizer"] is False


def test_deepspeed_measures_and_prints_nothing(tmp_path: Path) -> None:
    """Its throughput timer makes the host wait for the device twice per micro-batch."""
    quiet = settings(tmp_path)
    assert quiet["timers"] == {"throughput": {"enabled": False}} and quiet["steps_per_print"] > 10**15


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_computes_no_norm_of_its_own(tmp_path: Path, stage: int) -> None:
    """Only stages 1 and 2 would; with the optimizer in host memory DeepSpeed needs it."""
    zero = settings(tmp_path, **{"train.zero_stage": stage})["zero_optimization"]
    assert zero["stage"] == stage
    assert zero.get("compute_grad_norm") is (False if stage in (1, 2) else None)
    assert "offload_optimizer" not in zero


@pytest.mark.parametrize("overlap", [None, False, True])
def test_deepspeed_decides_about_overlapping_unless_the_config_does(tmp_path: Path, overlap: bool | None) -> None:
    """Its own default depends on the stage."""
    zero = settings(tmp_path, **{"train.zero_stage": 3, "train.overlap_comm": overlap})["zero_optimization"]
    assert zero.get("overlap_comm", "unset") == ("unset" if overlap is None else overlap)


def test_an_offloaded_optimizer_is_on_the_host(tmp_path: Path) -> None:
    zero = settings(tmp_path, **{"train.zero_stage": 2, "train.offload_optimizer": True})["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert "compute_grad_norm" not in zero


def test_the_users_zero_settings_are_kept_beside_ours(tmp_path: Path) -> None:
    own = {"zero_optimization": {"reduce_bucket_size": 1000}}
    zero = settings(tmp_path, deepspeed=own, **{"train.zero_stage": 1})["zero_optimization"]
    assert zero["reduce_bucket_size"] == 1000 and zero["stage"] == 1
