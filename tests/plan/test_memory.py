"""The models of `pipeline plan` and `pipeline check` against what engines on two ranks really hold and send."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.plan.memory import process_memory
from pipeline.plan.step_time import step_volumes
from tests import experiment, processes
from tests.plan.measure import measure

# Large enough that kilobytes of bookkeeping do not count. The bucket is one that a step fills: what is never written
# to takes no memory of a host, and the measurement cannot tell.
SHAPE = {
    "model.vocab_size": 512, "model.context_length": 64, "model.d_model": 192, "model.num_layers": 4,
    "model.num_heads": 4, "model.d_ff": 512, "train.batch_size": 8, "train.micro_batch_size": 2,
    "deepspeed.zero_optimization.reduce_bucket_size": 200_000,
}  # fmt: skip
AGREED = range(64)  # bytes of the numbers that ranks agree on in every step: loss, norm, flags
RECOMPUTED = "train.activation_checkpointing=true"
GATHERED = "deepspeed.zero_optimization.param_persistence_threshold=1000"


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
def test_an_engine_takes_the_memory_and_sends_the_bytes_of_the_plan(moment: str, overrides: list[str], tmp_path: Path):
    file = experiment.write_experiment(tmp_path, tmp_path / "runs", "measured", **SHAPE)
    config = load_config(file, overrides, world_size=2)
    memory = process_memory(config, 2, on_cpu=True)
    found = processes.on_ranks(measure, 2, tmp_path / "log", str(file), overrides)
    assert memory.moment == moment
    # Without the copy of a save, which these steps do not make.
    assert memory.peak - memory.host == pytest.approx(max(rank["peak"] for rank in found), rel=0.03)
    micro_batches = config.train.batch_size // (2 * config.train.micro_batch_size)
    assert found[0]["all_reduce"] - step_volumes(config, micro_batches).all_reduce[0] in AGREED
