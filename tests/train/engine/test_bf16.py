"""bf16 against float32 and plain PyTorch: one loss curve at every ZeRO stage, also across stages and precisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.weights import load_weights
from pipeline.run.folder import step_name
from tests.experiment import STEPS, curve, events, in_precision
from tests.train.conftest import Lab
from tests.train.engine.reference import train_plainly
from tests.train.engine.test_numerics import SHORT, follows, losses

TOLERANCE = 4e-3
"""Of the loss; a bfloat16 number has seven bits of mantissa, so that one of them is off by up to 4e-3 itself."""
LAYOUTS = [(1, 0), (2, 1), (2, 2), (2, 3)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("world", "stage"), LAYOUTS)
def test_a_hundred_steps_stay_on_the_curve_of_float32(lab: Lab, world: int, stage: int) -> None:
    run = lab.uninterrupted(world, stage, "bf16")
    assert [step for step, _ in curve(run)] == list(range(1, STEPS + 1))
    theirs = losses(lab.uninterrupted(1, 0))
    assert losses(run) == pytest.approx(theirs, rel=TOLERANCE)
    assert losses(run) != theirs, "it is not float32 that was compared"


@pytest.mark.parametrize(("world", "stage"), LAYOUTS)
def test_checkpoints_hold_float32_weights_that_bfloat16_cannot(lab: Lab, world: int, stage: int) -> None:
    weights = load_weights(lab.uninterrupted(world, stage, "bf16") / "checkpoints" / step_name(STEPS))
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


@pytest.mark.parametrize(("world", "stage"), [(1, 0), (1, 3), (2, 1)])
def test_it_follows_plain_pytorch_under_autocast(lab: Lab, world: int, stage: int) -> None:
    settings = {"train.precision": "bf16", "train.micro_batch_size": 8 // world, **SHORT}
    run = lab.train(f"bf16_{world}_{stage}", world, stage, **settings)
    follows(run, train_plainly(lab.config("plain_bf16", **settings), range(40)), TOLERANCE)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_optimizer_in_host_memory_takes_the_same_steps(lab: Lab, stage: int) -> None:
    """Also across a resume."""
    settings = {"train.precision": "bf16", "train.offload_optimizer": True, **SHORT}
    lab.train(f"bf16_offload_{stage}", 2, stage, "train.max_iters=17", **settings)
    run = lab.train(f"bf16_offload_{stage}", 2, stage, **settings)
    assert [e["step"] for e in events(run, "resumed")] == [17]
    theirs = losses(lab.uninterrupted(2, stage, "bf16"))[:40]
    assert losses(run) == pytest.approx(theirs, rel=TOLERANCE)


def test_other_stages_numbers_of_ranks_and_precisions_continue_along_one_curve(lab: Lab) -> None:
    """Four ranks at ZeRO-3 in bf16, then one at ZeRO-0 in float32, then two at ZeRO-2 in bf16."""
    for world, stage, precision, until in ((4, 3, "bf16", 30), (1, 0, "fp32", 65), (2, 2, "bf16", STEPS)):
        settings = in_precision(precision, world, stage)
        run = lab.train("precisions", world, stage, f"train.max_iters={until}", **settings)
    assert [(e["step"], e["world_size"]) for e in events(run, "resumed")] == [(30, 1), (65, 2)]
    assert [step for step, _ in curve(run)] == list(range(1, STEPS + 1)), "each step once"
    theirs = losses(lab.uninterrupted(1, 0))
    assert losses(run) == pytest.approx(theirs, rel=TOLERANCE)


def test_weights_that_a_node_keeps_a_copy_of_are_resumed_bit_for_bit(lab: Lab, tmp_path: Path) -> None:
    """DeepSpeed's hierarchical partitions: the node's copy is older than the load and must not be used after it."""
    zero = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    settings = {"train.precision": "bf16", "deepspeed": {"zero_optimization": zero}}
    lab.train("bf16_hierarchical", 2, 3, "train.max_iters=5", **settings)
    run = lab.train("bf16_hierarchical", 2, 3, "train.max_iters=12", **settings)
    assert [e["step"] for e in events(run, "resumed")] == [5]
    whole = lab.train("bf16_hierarchical_whole", 2, 3, "train.max_iters=12", **settings)
    assert curve(run) == curve(whole)
    assert losses(run) == pytest.approx(losses(lab.uninterrupted(1, 0))[:12], rel=TOLERANCE)
