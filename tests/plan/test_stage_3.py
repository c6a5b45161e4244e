"""What ZeRO-3 keeps whole or gathered is neither gathered nor sent a second time."""

from __future__ import annotations

import pytest

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.model.flops import num_parameters
from pipeline.plan.memory import process_memory
from pipeline.plan.step_time import step_volumes

ZERO = "deepspeed.zero_optimization"


def config(*overrides: str) -> Config:
    return load_config("configs/demo.yaml", ["train.zero_stage=3", *overrides])


def test_a_small_model_is_gathered_once_per_micro_batch_and_a_large_one_twice():
    small = config()
    model = small.model
    size = 4.0 * num_parameters(model)
    assert step_volumes(small, 5).all_gather == (5 * size, 5)
    large = config(f"{ZERO}.stage3_max_live_parameters=1000")
    assert step_volumes(large, 5).all_gather == (10 * size, 10 * (model.num_layers + 2))


def test_a_threshold_above_every_weight_keeps_the_whole_model_and_gathers_nothing():
    kept = config(f"{ZERO}.stage3_param_persistence_threshold=1000000000", f"{ZERO}.reduce_bucket_size=1")
    model = kept.model
    total = num_parameters(model)
    assert process_memory(kept, 4, on_cpu=True).buffers == pytest.approx(4 * total, rel=1e-5)
