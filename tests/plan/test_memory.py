"""Engines on two ranks hold and send what `pipeline plan` and `pipeline check` predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.model.on_cpu import CACHED_ELEMENTS, SHORT_CONTEXT
from pipeline.plan.activations import _CACHED, _SHORT_CONTEXT, activations
from pipeline.plan.memory import BytesPerParameter, _starting, checkpoint_bytes, model_state, process_memory
from pipeline.plan.step_time import step_volumes
from tests import experiment, processes
from tests.plan.measure import measure
from tests.plan.published import llama

# Large enough that kilobytes of bookkeeping do not count. A step fills the bucket: memory that is never written takes
# nothing from a host, and the measurement cannot tell.
SHAPE = {
    "model.vocab_size": 4096, "model.context_length": 64, "model.d_model": 192, "model.num_layers": 4,
    "model.num_heads": 4, "model.d_ff": 512, "train.batch_size": 4, "train.micro_batch_size": 2,
    "train.loss_chunk_tokens": 32, "deepspeed.zero_optimization.reduce_bucket_size": 200_000,
}  # fmt: skip
WHOLE = "train.loss_chunk_tokens=128"  # all tokens of a micro-batch, so that the loss is the peak
AGREED = range(64)  # bytes of the numbers that ranks reduce in every step: loss, norm, flags
BF16 = "train.precision=bf16"
SEVERAL = "train.batch_size=8"  # two micro-batches
GATHERED = "deepspeed.zero_optimization.stage3_param_persistence_threshold=1000"
SPARING = [
    f"deepspeed.zero_optimization.stage3_{key}=0"
    for key in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
]
HEAD = "model.vocab_size=2048"  # reduced at once: larger than the bucket
LONG = ["model.vocab_size=512", "model.context_length=512", "train.micro_batch_size=1", "train.batch_size=2"]
RECOMPUTED = "train.activation_checkpointing=full"
TIED = "model.tie_embeddings=true"
FULL_BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=1000000"  # with the head, or with two blocks
SHARED = ["model.num_kv_heads=2", "model.head_dim=64", "model.qkv_bias=true", "model.qk_norm=true"]


def test_memory_of_the_zero_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 devices, 2 + 2 + 12 bytes per parameter."""
    sums = [sum(model_state(7_500_000_000, 64, stage, BytesPerParameter(2, 2, 12))) / 1e9 for stage in range(4)]
    assert [round(s, 1) for s in sums] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "overrides"),
    [
        ("loss", ["train.zero_stage=0", BF16, SEVERAL, WHOLE]),
        ("reduction", ["train.zero_stage=0"]),
        ("reduction", ["train.zero_stage=1"]),
        ("reduction", ["train.zero_stage=1", FULL_BUCKET]),
        ("optimizer step", ["train.zero_stage=1", BF16, HEAD]),
        ("first gradients", ["train.zero_stage=2", SEVERAL]),
        ("first gradients", ["train.zero_stage=2", BF16]),
        ("loss", ["train.zero_stage=2", BF16, SEVERAL, WHOLE]),
        ("gathering", ["train.zero_stage=3", GATHERED]),
        ("loss", ["train.zero_stage=3", GATHERED, BF16, SEVERAL]),
        ("loss", ["train.zero_stage=3", GATHERED, BF16, WHOLE, *SPARING]),
        ("optimizer step", ["train.zero_stage=2", RECOMPUTED]),
        ("recomputation", ["train.zero_stage=2", RECOMPUTED, *LONG]),
        ("recomputation", ["train.zero_stage=2", BF16, RECOMPUTED, *LONG]),
        ("recomputation", ["train.zero_stage=2", "train.activation_checkpointing=selective", *LONG, HEAD]),
        ("reduction", ["train.zero_stage=0", SEVERAL, *SHARED]),
        ("gathering", ["train.zero_stage=3", GATHERED, *SHARED]),
        ("reduction", ["train.zero_stage=0", TIED]),
        ("loss", ["train.zero_stage=0", TIED, BF16, SEVERAL]),
        ("last gradients", ["train.zero_stage=1", TIED, SEVERAL, RECOMPUTED]),
        ("loss", ["train.zero_stage=1", TIED, BF16]),
        ("reduction", ["train.zero_stage=2", TIED]),
        ("last gradients", ["train.zero_stage=2", TIED, SEVERAL, RECOMPUTED]),
        ("reduction", ["train.zero_stage=2", TIED, BF16, HEAD, FULL_BUCKET]),
        ("loss", ["train.zero_stage=2", TIED, BF16, SEVERAL]),
        ("last gradients", ["train.zero_stage=2", TIED, BF16, RECOMPUTED, "model.num_layers=6"]),
        ("gathering", ["train.zero_stage=3", GATHERED, TIED, SEVERAL]),
        ("loss", ["train.zero_stage=3", GATHERED, TIED, BF16, SEVERAL]),
        ("loss", ["train.zero_stage=3", GATHERED, TIED, BF16, RECOMPUTED]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_engine_holds_the_memory_and_sends_the_bytes_of_the_plan(moment: str, overrides: list[str], tmp_path: Path):
    found, config = holds_what_is_planned(2, moment, overrides, tmp_path)
    micro_batches = config.train.batch_size // (2 * config.train.micro_batch_size)
    assert found["all_reduce"] - step_volumes(config, micro_batches).all_reduce[0] in AGREED


@pytest.mark.slow
def test_a_single_process_holds_the_memory_of_the_plan(tmp_path: Path):
    alone = ["train.zero_stage=0", TIED, RECOMPUTED, "train.batch_size=2"]
    found, _ = holds_what_is_planned(1, "last gradients", alone, tmp_path)
    assert "all_reduce" not in found


def holds_what_is_planned(ranks: int, moment: str, overrides: list[str], folder: Path) -> tuple[dict[str, int], Config]:
    """Compares the peaks of an engine with the plan; returns what its first rank measured, and the config."""
    file = experiment.write_experiment(folder, folder / "runs", "measured", **SHAPE)
    config = load_config(file, overrides, world_size=ranks)
    memory = process_memory(config, ranks, on_cpu=True)
    found = processes.on_ranks(measure, ranks, folder / "log", str(file), overrides)
    assert memory.moment == moment
    # Without the host copy of a save: these steps make none.
    assert memory.peak - memory.host == pytest.approx(max(rank["peak"] for rank in found), rel=0.03)
    return found[0], config


def test_logits_take_no_more_than_a_chunk_of_tokens():
    """Beyond the head's weight and gradient, another vocabulary only changes the chunk."""
    few, many = (
        activations(llama("7B", zero_stage=3, micro_batch_size=size, activation_checkpointing="full"), 3)
        for size in (1, 16)
    )
    assert many.loss - few.loss == pytest.approx(15 * 2 * 2 * 4096 * 2048), "the normed input and its gradient"


def test_the_plan_knows_the_constants_of_the_model():
    assert (_SHORT_CONTEXT, _CACHED) == (SHORT_CONTEXT, CACHED_ELEMENTS)


def test_recomputing_more_keeps_less():
    kept = [
        activations(llama("7B", zero_stage=3, activation_checkpointing=mode), 3).kept
        for mode in ("none", "selective", "full")
    ]
    assert kept[0] > 1.5 * kept[1] > 3 * kept[2]


def test_a_start_at_stage_3_needs_the_share_and_one_parameter_of_host_memory():
    """The copy of a save, which is pinned once training begins, is larger."""
    config, ranks = llama("65B", zero_stage=3), 128
    parameters = checkpoint_bytes(config) / 12
    assert _starting(config.model, 3, ranks, 2) == pytest.approx(2 * (parameters / ranks + 32000 * 8192))
    assert process_memory(config, ranks).host == 12 * parameters / ranks
    assert _starting(config.model, 2, ranks, 2) == 2 * parameters, "DeepSpeed flattens all weights of each rank"
