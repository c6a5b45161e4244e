"""The engine against plain PyTorch: one loss curve at any number of ranks, ZeRO stage and micro-batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.weights import load_weights
from pipeline.config.load import load_config
from pipeline.run.folder import step_name
from tests.experiment import STEPS, curve, lines
from tests.train.conftest import Lab
from tests.train.engine.reference import Plain, train_plainly

TOLERANCE = 1e-5
SHORT = {"train.max_iters": 40}
LAYOUTS = [(world, stage) for world in (1, 2, 4) for stage in (0, 1, 2, 3)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def plain(lab: Lab) -> Plain:
    return train_plainly(lab.config("plain"), range(STEPS))


def norms(run: Path) -> list[float]:
    return [line["train/grad_norm"] for line in lines(run / "metrics.jsonl") if "train/grad_norm" in line]


def losses(run: Path) -> list[float]:
    return [loss for _, loss in curve(run)]


def follows(run: Path, plain: Plain, tolerance: float = TOLERANCE) -> None:
    """Compares the losses up to the run's last step."""
    assert [step for step, _ in curve(run)] == list(range(1, load_config(run / "config.yaml").train.max_iters + 1))
    assert losses(run) == pytest.approx(plain.losses[: len(losses(run))], rel=tolerance)


def test_the_plain_loop_learns_and_is_clipped_in_some_steps_only(plain: Plain) -> None:
    """Otherwise the comparisons below would say little."""
    assert plain.losses[-1] < 0.35 * plain.losses[0]
    assert 5 < sum(norm > 0.8 for norm in plain.norms) < STEPS - 5


@pytest.mark.parametrize(("world", "stage"), LAYOUTS)
def test_a_hundred_steps_equal_plain_pytorch(lab: Lab, plain: Plain, world: int, stage: int) -> None:
    run = lab.uninterrupted(world, stage)
    follows(run, plain)
    assert norms(run) == pytest.approx(plain.norms, rel=1e-4), "the norm before clipping is PyTorch's"
    for name, weight in load_weights(run / "checkpoints" / step_name(STEPS)).items():
        torch.testing.assert_close(weight, plain.weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("world", "stage", "micro"), [(1, 0, 8), (1, 0, 1), (1, 3, 8), (2, 2, 4), (2, 1, 1)])
def test_gradient_accumulation_changes_nothing(lab: Lab, plain: Plain, world: int, stage: int, micro: int) -> None:
    name = f"accumulate_{world}_{stage}_{micro}"
    follows(lab.train(name, world, stage, **{"train.micro_batch_size": micro, **SHORT}), plain)


@pytest.mark.parametrize(("stage", "mode"), [(0, "full"), (2, "full"), (2, "selective"), (3, "full")])
def test_recomputing_activations_changes_no_bit(lab: Lab, stage: int, mode: str) -> None:
    run = lab.train(f"recompute_{stage}_{mode}", 1, stage, **{"train.activation_checkpointing": mode, **SHORT})
    assert len(losses(run)) == 40 and losses(run) == losses(lab.uninterrupted(1, stage))[:40]


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (2, 2), (1, 3)])
def test_an_optimizer_in_host_memory_takes_the_same_steps(lab: Lab, plain: Plain, world: int, stage: int) -> None:
    """Also across a resume: a checkpoint reads and writes host memory too."""
    settings = {"train.offload_optimizer": True, **SHORT}
    lab.train(f"offload_{world}_{stage}", world, stage, "train.max_iters=17", **settings)
    follows(lab.train(f"offload_{world}_{stage}", world, stage, **settings), plain)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_overlapped_reduction_gives_the_same_curve(lab: Lab, plain: Plain, stage: int) -> None:
    follows(lab.train(f"overlap_{stage}", 2, stage, **{"train.overlap_comm": True, **SHORT}), plain)
