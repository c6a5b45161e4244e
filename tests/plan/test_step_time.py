"""Bounds of a step's time, and the bytes it sends, agree with published figures."""

from __future__ import annotations

import pytest

from pipeline.model.flops import num_parameters
from pipeline.plan.devices import device_named
from pipeline.plan.memory import process_memory
from pipeline.plan.step_time import ARITHMETIC, Network, Volumes, step_time, step_volumes
from tests.plan.published import LLAMA, llama


@pytest.mark.parametrize("name", LLAMA)
def test_parameters_of_the_llama_paper(name):
    millions = LLAMA[name][0]
    assert num_parameters(llama(name).model) == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", LLAMA)
def test_the_published_speed_of_llama_lies_inside_the_bounds_of_arithmetic(name):
    """Tokens per second and A100, from the paper's GPU-hours; its communication overlapped with the arithmetic."""
    config = llama(name)
    *_, gpu_hours, tokens = LLAMA[name]
    slowest, fastest = (
        2048 / step_time(config, device_named("a100"), Network(1, 1, 1, 1), 1, part, 1.0, overlaps=False).compute_s
        for part in ARITHMETIC
    )
    assert slowest < tokens / (gpu_hours * 3600) < fastest


def test_volumes_of_the_zero_paper():
    """Section 7, elements sent per step on many devices: 2 Psi for the baseline, 3 Psi with partitioned weights."""
    config = llama("7B", precision="fp32")
    psi = 4.0 * num_parameters(config.model)
    sent = [_sent_per_rank(step_volumes(config, 1, stage)) / psi for stage in range(4)]
    assert sent[0] == pytest.approx(2) and sent[3] == pytest.approx(3)
    # DeepSpeed all-reduces its buckets at stages 1 and 2, where the paper reduces and scatters them: 3, not 2.
    assert sent[1] == sent[2] == pytest.approx(3)


def test_bf16_halves_what_partitioned_weights_send_and_a_switch_reduces_in_float32():
    narrow, wide = llama("7B", zero_stage=3), llama("7B", zero_stage=3, precision="fp32")
    for stage in (1, 2, 3):
        assert _sent_per_rank(step_volumes(narrow, 4, stage)) == _sent_per_rank(step_volumes(wide, 4, stage)) / 2
    assert step_volumes(narrow, 4, 0) == step_volumes(wide, 4, 0), "at stage 0 weights are float32"
    reduced = llama("7B", zero_stage=3).model_copy(update={"deepspeed": {"communication_data_type": "fp32"}})
    assert step_volumes(reduced, 4).reduce_scatter == step_volumes(wide, 4).reduce_scatter
    assert step_volumes(reduced, 4).all_gather == step_volumes(narrow, 4).all_gather


def test_a_second_copy_inside_the_node_takes_half_of_the_gathers_off_the_network():
    """It pays between nodes, not inside one, and costs its share of memory."""
    config = llama("7B", zero_stage=3)
    copied = config.model_copy(update={"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 8}}})
    before, after = step_volumes(config, 4), step_volumes(copied, 4)
    assert after.all_gather[0] == after.node_all_gather[0] == before.all_gather[0] / 2
    device = device_named("h100")

    def seconds(config, nodes):
        network = Network(nodes, 8, device.intra_gb_per_s, 50)
        return step_time(config, device, network, 2048, 0.5, 1.0, overlaps=False).communication_s

    assert seconds(copied, 8) < 0.75 * seconds(config, 8)
    assert seconds(copied, 1) == pytest.approx(seconds(config, 1))
    second = process_memory(copied, 64).peak - process_memory(config, 64).peak
    assert second == pytest.approx(2 * 6_738_415_616 / 8, rel=0.01)


def _sent_per_rank(volumes: Volumes) -> float:
    """Bytes that each of many ranks sends in rings."""
    return 2 * volumes.all_reduce[0] + volumes.reduce_scatter[0] + volumes.all_gather[0]


def test_a_ring_all_reduce_of_nccl_tests():
    """A ring reaches the bus bandwidth as nccl-tests define it: size x 2 (n - 1) / n / seconds."""
    network = Network(nodes=4, per_node=8, intra_gb_per_s=300, inter_gb_per_s=200)
    size = 8e9
    assert 2 * 31 / 32 * size / (2 * network.ring_s(size, 1.0)) / 1e9 == pytest.approx(200, rel=0.02)
    one_node = Network(nodes=1, per_node=8, intra_gb_per_s=300, inter_gb_per_s=200)
    assert 2 * 7 / 8 * size / (2 * one_node.ring_s(size, 1.0)) / 1e9 == pytest.approx(300, rel=0.02)
    assert Network(1, 1, 300, 200).ring_s(size, 1.0) == 0
