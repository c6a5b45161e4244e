"""Engines on two ranks hold and send what `pipeline plan` and `pipeline check` predict."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.plan.memory import BytesPerParameter, model_state, process_memory
from pipeline.plan.step_time import step_volumes
from tests import experiment, processes
from tests.plan.measure import measure

# Large enough that kilobytes of bookkeeping do not count. A step fills the bucket: memory that is never written takes
# nothing from a host, and the measurement cannot tell.
SHAPE = {
    "model.vocab_size": 512, "model.context_length": 64, "model.d_model": 192, "model.num_layers": 4,
    "model.num_heads": 4, "model.d_ff": 512, "train.batch_size": 8, "train.micro_batch_size": 2,
    "deepspeed.zero_optimization.reduce_bucket_size": 200_000,
}  # fmt: skip
AGREED = range(64)  # bytes of the numbers that ranks reduce in every step: loss, norm, flags
RECOMPUTED = "train.activation_checkpointing=true"
GATHERED = "deepspeed.zero_optimization.stage3_param_persistence_threshold=1000"


def test_memory_of_the_zero_paper():
    """Rajbhandari et al. 2020, figure 1: 7.5B parameters on 64 devices, 2 + 2 + 12 bytes per parameter."""
    sums = [sum(model_state(7_500_000_000, 64, stage, BytesPerParameter(2, 2, 12))) / 1e9 for stage in range(4)]
    assert [round(s, 1) for s in sums] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "overrides"),
    [
        ("backward", ["train.zero_stage=0", "train.precision=bf16"]),
        ("reduction", ["train.zero_stage=0", "train.batch_size=4", "model.context_length=16"]),
        ("recomputation", ["train.zero_stage=1", RECOMPUTED]),
        ("first gradients", ["train.zero_stage=2"]),
        ("backward", ["train.zero_stage=3", GATHERED]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_engine_holds_the_memory_and_sends_the_bytes_of_the_plan(moment: str, overrides: list[str], tmp_path: Path):
    file = experiment.write_experiment(tmp_path, tmp_path / "runs", "measured", **SHAPE)
    config = load_config(file, overrides, world_size=2)
    memory = process_memory(config, 2, on_cpu=True)
    found = processes.on_ranks(measure, 2, tmp_path / "log", str(file), overrides)
    assert memory.moment == moment
    # Without the host copy of a save: these steps make none.
    assert memory.peak - memory.host == pytest.approx(max(rank["peak"] for rank in found), rel=0.03)
    micro_batches = config.train.batch_size // (2 * config.train.micro_batch_size)
    assert found[0]["all_reduce"] - step_volumes(config, micro_batches).all_reduce[0] in AGREED
