"""Plans agree with published runs and grow with the nodes as they should; test_memory.py measures this engine."""

from __future__ import annotations

import itertools

import pytest

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


def test_memory_that_a_process_needs_to_the_last_byte_fits():
    memory = process_memory(llama("7B"), 8)
    assert fits_device(memory, needed_bytes(memory) / GIB)
    assert not fits_device(memory, (needed_bytes(memory) - 4096) / GIB)


def test_the_batch_grows_only_if_the_ranks_cannot_share_it():
    config = llama("7B", batch_size=512, micro_batch_size=4)
    assert [shared_batch(config, ranks) for ranks in (1, 128, 96, 1024)] == [512, 512, 768, 4096]
