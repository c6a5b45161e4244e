"""Plans agree with published runs and grow with the nodes as they should; test_memory.py measures this engine."""

from __future__ import annotations

import itertools

import pytest

from pipeline.model.flops import num_parameters
from pipeline.plan.devices import GIB
from pipeline.plan.memory import process_memory
from pipeline.plan.plan import MTBF_NODE_HOURS, fits_device, make_plan, needed_bytes, shared_batch
from tests.plan.published import cluster_of, llama


def test_goodput_of_llama_3():
    """Grattafiori et al. 2024, section 3.3.4: above 90% on 2,048 nodes with a failure every three hours."""
    row = make_plan(llama("65B", checkpoint_interval=100), [2048], cluster_of("a100", storage_gb_per_s=2000.0))[0]
    assert row.mtbf_hours == pytest.approx(54 * 24 / 419)
    assert 0.90 < row.best_goodput < 0.99
    assert pytest.approx(6334, rel=0.001) == MTBF_NODE_HOURS


def test_more_nodes_never_make_a_step_slower_nor_efficiency_better():
    rows = make_plan(llama("7B", zero_stage=2, activation_checkpointing=True), [1, 8, 64, 256], cluster_of("a100"))
    for before, after in itertools.pairwise(rows):
        assert after.step_s[0] < before.step_s[0] and after.step_s[1] < before.step_s[1]
        assert after.efficiency[0] <= before.efficiency[0] and after.efficiency[1] <= before.efficiency[1]
        assert after.goodput < before.goodput


def test_later_stages_never_need_more_memory_for_a_large_model():
    rows = make_plan(llama("7B", activation_checkpointing=True), [8, 64], cluster_of("a100"))
    for row in rows:
        assert list(row.peak_by_stage) == sorted(row.peak_by_stage, reverse=True)
    assert not rows[0].fits  # 16 bytes per parameter at stage 0
    assert make_plan(llama("7B", zero_stage=2, activation_checkpointing=True), [8], cluster_of("a100"))[0].fits


def test_what_is_expected_lies_between_the_bounds_and_is_said_of_calibrated_devices_only():
    (row,) = make_plan(llama("7B", zero_stage=3), [8], cluster_of("h100", price_per_device_hour=2.0))
    found = row.expected
    assert found is not None and row.cost is not None and found.cost is not None
    slower = found.step_s / row.step_s[0]  # than the fastest
    assert 1 < slower < row.step_s[1] / row.step_s[0]
    for fastest, value in ((row.days, found.days), (row.device_hours, found.device_hours), (row.cost, found.cost)):
        assert value / fastest[0] == pytest.approx(slower)
    for fastest, value in ((row.tokens_per_s, found.tokens_per_s), (row.mfu, found.mfu)):
        assert fastest[1] / value == pytest.approx(slower)
    assert make_plan(llama("7B", zero_stage=3), [8], cluster_of("b200"))[0].expected is None
    assert make_plan(llama("7B", zero_stage=3, precision="fp32"), [8], cluster_of("h100"))[0].expected is None


def test_memory_that_a_process_needs_to_the_last_byte_fits():
    memory = process_memory(llama("7B"), 8)
    assert fits_device(memory, needed_bytes(memory) / GIB)
    assert not fits_device(memory, (needed_bytes(memory) - 4096) / GIB)


def test_hours_rates_and_cost_are_those_of_the_days():
    (row,) = make_plan(llama("7B", batch_size=512), [8], cluster_of("a100", price_per_device_hour=2.0))
    for end in (0, 1):
        assert row.node_hours[end] == pytest.approx(8 * 24 * row.days[end])
        assert row.device_hours[end] == pytest.approx(8 * row.node_hours[end])
        assert row.cost is not None and row.cost[end] == pytest.approx(2 * row.device_hours[end])
        assert row.tokens_per_device_s[end] == pytest.approx(row.tokens_per_s[end] / 64)
    assert make_plan(llama("7B"), [8], cluster_of("a100"))[0].cost is None


def test_mfu_counts_what_the_model_needs_not_what_is_recomputed():
    """6 FLOP per weight and token, which one A100 does at 312 TFLOP/s; recomputing makes a step longer, not larger."""
    mfu = {}
    for checkpointing in ("none", "full"):
        config = llama("7B", activation_checkpointing=checkpointing)
        (row,) = make_plan(config, [1], cluster_of("a100"))
        flops = 6 * num_parameters(config.model) + 12 * 32 * 4096 * config.model.context_length
        embeddings = 6 * 32000 * 4096  # looked up, not multiplied
        assert row.mfu[1] == pytest.approx((flops - embeddings) * row.tokens_per_device_s[1] / 312e12, rel=1e-3)
        mfu[checkpointing] = row.mfu[1]
    assert 3 / 4 < mfu["full"] / mfu["none"] < 0.76 and mfu["none"] < 1


def test_the_batch_grows_only_if_the_ranks_cannot_share_it():
    config = llama("7B", batch_size=512, micro_batch_size=4)
    assert [shared_batch(config, ranks) for ranks in (1, 128, 96, 1024)] == [512, 512, 768, 4096]
