"""`pipeline plan` against what others have published; against this engine itself: test_memory.py."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys

import pytest

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.model.flops import num_parameters
from pipeline.plan.devices import device_named, device_reported
from pipeline.plan.failure_model import Failures
from pipeline.plan.memory import Layout, model_state
from pipeline.plan.plan import MTBF_NODE_HOURS, Cluster, plan, shared_batch
from pipeline.plan.step_time import ARITHMETIC, Network, step_time, step_volumes

# Touvron et al. 2023 (LLaMA), table 2: parameters, d_model, heads, layers; d_ff from the released configs. This
# project's model has the same parts: SwiGLU, RMSNorm, RoPE, no biases, untied head, 32,000 tokens. Table 15: GPU-hours
# on A100-80GB for 1.0 and 1.4 trillion tokens.
LLAMA = {
    "7B": (6.7e9, 4096, 32, 32, 11008, 82_432, 1.0e12),
    "13B": (13.0e9, 5120, 40, 40, 13824, 135_168, 1.0e12),
    "33B": (32.5e9, 6656, 52, 60, 17920, 530_432, 1.4e12),
    "65B": (65.2e9, 8192, 64, 80, 22016, 1_022_362, 1.4e12),
}


def llama(name: str, **train: object) -> Config:
    _, d_model, heads, layers, d_ff, _, _ = LLAMA[name]
    overrides = {
        "model.vocab_size": 32000, "model.context_length": 2048, "model.d_model": d_model, "model.num_heads": heads,
        "model.num_layers": layers, "model.d_ff": d_ff, "train.batch_size": 2048, "train.micro_batch_size": 1,
        "train.precision": "bf16", **{f"train.{key}": value for key, value in train.items()},
    }  # fmt: skip
    return load_config("configs/demo.yaml", [f"{key}={value}" for key, value in overrides.items()])


def a100_cluster(**changes: float) -> Cluster:
    a100 = device_named("a100")
    return Cluster(a100, a100.per_node, a100.intra_gb_per_s, a100.inter_gb_per_s, **changes)


def test_memory_of_the_zero_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 devices, 2 + 2 + 12 bytes a parameter."""
    sums = [sum(model_state(7_500_000_000, 64, stage, Layout(2, 2, 12))) / 1e9 for stage in range(4)]
    assert [round(s, 1) for s in sums] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("name", LLAMA)
def test_parameters_of_the_llama_paper(name):
    millions, d_model, _, layers, d_ff, _, _ = LLAMA[name]
    assert num_parameters(32000, d_model, layers, d_ff) == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", LLAMA)
def test_the_published_speed_of_llama_lies_inside_the_bounds_of_arithmetic(name):
    """Tokens a second and A100, from the paper's GPU-hours; it hid its communication behind the arithmetic."""
    config = llama(name)
    *_, gpu_hours, tokens = LLAMA[name]
    slowest, fastest = (
        2048 / step_time(config, device_named("a100"), Network(1, 1, 1, 1), 1, part, 1.0, overlaps=False).compute_s
        for part in ARITHMETIC
    )
    assert slowest < tokens / (gpu_hours * 3600) < fastest


def test_volumes_of_the_zero_paper():
    """Section 7: 2 Psi for the baseline, 3 Psi with weights partitioned: elements sent a step, for many devices."""
    config = llama("7B")
    psi = 4.0 * num_parameters(32000, 4096, 32, 11008)
    sent = [step_volumes(config, 1, stage).sent_per_rank(10**9) / psi for stage in range(4)]
    assert sent[0] == pytest.approx(2) and sent[3] == pytest.approx(3)
    # DeepSpeed all-reduces its buckets at stages 1 and 2, where the paper reduces and scatters them: 3 and not 2.
    assert sent[1] == sent[2] == pytest.approx(3)


def test_a_ring_all_reduce_of_nccl_tests():
    """Bus bandwidth, as nccl-tests define it, is what a ring reaches: size x 2 (n - 1) / n / seconds."""
    network = Network(nodes=4, per_node=8, intra_gb_per_s=300, inter_gb_per_s=200)
    size = 8e9
    assert 2 * 31 / 32 * size / (2 * network.ring_s(size, 1.0)) / 1e9 == pytest.approx(200, rel=0.02)
    one_node = Network(nodes=1, per_node=8, intra_gb_per_s=300, inter_gb_per_s=200)
    assert 2 * 7 / 8 * size / (2 * one_node.ring_s(size, 1.0)) / 1e9 == pytest.approx(300, rel=0.02)
    assert Network(1, 1, 300, 200).ring_s(size, 1.0) == 0


def test_goodput_agrees_with_a_simulation():
    """A million segments of training, each of which a failure may cut, with saves in the background."""
    failures = Failures(mtbf_s=7200.0, restart_s=300.0, stall_s=2.0, save_s=0.0)
    interval, rng = 900.0, random.Random(0)
    clock, done = 0.0, 0
    for _ in range(200_000):
        until_failure = rng.expovariate(1 / failures.mtbf_s)
        if until_failure >= interval + failures.stall_s:
            clock += interval + failures.stall_s
            done += 1
            continue
        clock += until_failure
        restart = failures.restart_s
        while (again := rng.expovariate(1 / failures.mtbf_s)) < restart:  # a restart can fail too
            clock += again
        clock += restart
    assert failures.goodput(interval) == pytest.approx(done * interval / clock, rel=0.005)


def test_the_best_interval_is_the_best_and_youngs_for_rare_failures():
    failures = Failures(mtbf_s=30_000.0, restart_s=300.0, stall_s=10.0, save_s=30.0)
    best = failures.best_interval_s()
    assert best == pytest.approx(math.sqrt(2 * 10.0 * 30_000.0), rel=0.02)
    assert failures.goodput(best) >= max(failures.goodput(best * factor) for factor in (0.5, 0.8, 1.25, 2.0))


def test_no_interval_is_shorter_than_a_save():
    failures = Failures(mtbf_s=1000.0, restart_s=60.0, stall_s=0.001, save_s=50.0)
    assert failures.best_interval_s() == 50.0
    assert failures.goodput(1.0) == failures.goodput(50.0)


def test_a_job_that_fails_all_the_time_gets_nowhere():
    assert Failures(mtbf_s=1.0, restart_s=3600.0, stall_s=1.0, save_s=60.0).goodput(600.0) == 0.0


def test_goodput_of_llama_3():
    """Grattafiori et al. 2024, section 3.3.4: above 90% on 2,048 nodes with a failure every three hours."""
    row = plan(llama("65B", checkpoint_interval=100), [2048], a100_cluster(storage_gb_per_s=2000.0))[0]
    assert row.mtbf_hours == pytest.approx(54 * 24 / 419)
    assert 0.90 < row.best_goodput < 0.99
    assert pytest.approx(6334, rel=0.001) == MTBF_NODE_HOURS


def test_more_nodes_never_make_a_step_slower_nor_efficiency_better():
    rows = plan(llama("7B", zero_stage=2, activation_checkpointing=True), [1, 8, 64, 256], a100_cluster())
    for before, after in itertools.pairwise(rows):
        assert after.step_s[0] < before.step_s[0] and after.step_s[1] < before.step_s[1]
        assert after.efficiency[0] <= before.efficiency[0] and after.efficiency[1] <= before.efficiency[1]
        assert after.goodput < before.goodput


def test_later_stages_never_need_more_memory_for_a_large_model():
    rows = plan(llama("7B", activation_checkpointing=True), [8, 64], a100_cluster())
    for row in rows:
        assert list(row.peak_by_stage) == sorted(row.peak_by_stage, reverse=True)
    assert not rows[0].fits  # 16 bytes a parameter at stage 0
    assert plan(llama("7B", zero_stage=2, activation_checkpointing=True), [8], a100_cluster())[0].fits


def test_the_batch_grows_only_where_the_ranks_cannot_share_it():
    config = llama("7B", batch_size=512, micro_batch_size=4)
    assert [shared_batch(config, ranks) for ranks in (1, 128, 96, 1024)] == [512, 512, 768, 4096]


def test_devices_are_found_by_what_drivers_report():
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA A100-SXM4-40GB": "A100 40GB",
        "NVIDIA A100-SXM4-80GB": "A100",
        "AMD Instinct MI300X": "MI300X",
    }
    for reported, name in names.items():
        found = device_reported(reported)
        assert found is not None and found.name == name
    assert device_reported("NVIDIA GeForce RTX 4090") is None


def pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], capture_output=True, text=True, check=False)


def test_the_command_prints_tables_and_json():
    shown = pipeline("plan", "configs/demo.yaml", "--nodes", "1,4", "--device", "a100")
    assert shown.returncode == 0, shown.stderr
    for words in ("ZeRO stage 0", "efficiency", "goodput", "cannot be shared", "docs/scaling.md"):
        assert words in shown.stdout
    rows = json.loads(pipeline("plan", "configs/demo.yaml", "--nodes", "1,4", "--json").stdout)
    assert [(row["nodes"], row["ranks"]) for row in rows] == [(1, 8), (4, 32)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h900"], "no device 'h900' in the table; there are: b200"),
        (["--nodes", "1,zero"], "--nodes 1,zero: "),
        (["--nodes", "0"], "numbers from 1"),
    ],
)
def test_wrong_options_are_named(arguments, words):
    done = pipeline("plan", "configs/demo.yaml", *arguments)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_planning_imports_no_torch():
    code = "import sys, pipeline.plan.plan, pipeline.plan.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
