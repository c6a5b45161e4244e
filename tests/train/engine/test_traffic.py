"""With bf16 the ranks keep and send half the bytes: counted on two ranks, in one step after the first."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.model.transformer import TransformerLM
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from tests import processes
from tests.test_bad_input import experiment
from tests.train.traffic import GATHERS, REDUCES, by_dtype, counted

SETTINGS = {"model.num_layers": 2, "train.batch_size": 8, "train.micro_batch_size": 4}
# Otherwise stage 3 would keep all these small weights whole.
FETCHED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Step(NamedTuple):
    """What a rank keeps and sends."""

    weights: int
    """Bytes of the working weights between two steps."""
    gathered: dict[torch.dtype, int]
    """Elements by dtype."""
    reduced: dict[torch.dtype, int]
    """Elements by dtype."""


def second_step(world: World, config_file: str, stage: int, precision: str) -> Step:
    overrides = [f"train.zero_stage={stage}", f"train.precision={precision}"]
    config = load_config(config_file, overrides, world_size=world.size)
    ids = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(world.rank))
    with counted() as sent:
        engine = Engine(config, world, torch.device("cpu"))
        engine.draw(0)
        engine.set_learning_rate(1e-3)
        for _ in range(2):  # the first finds out in which order stage 3 needs the weights
            sent.clear()
            engine.zero_grad()
            loss, entropy = engine.loss(ids[:, :-1], ids[:, 1:])
            engine.backward(loss)
            passes = sent.copy()
            engine.reduce_and_clip(1.0, [entropy], stop=False)
            sent.clear()
            engine.step()
        sent.update(passes)
    return Step(working_bytes(engine), by_dtype(sent, GATHERS), by_dtype(sent, REDUCES))


def working_bytes(engine: Engine) -> int:
    """Returns the bytes of the weights that forward uses, each storage counted once."""
    storages: dict[int, int] = {}
    for parameter in engine.module.parameters():
        for tensor in (parameter.data, getattr(parameter, "ds_tensor", None)):
            if tensor is not None and tensor.numel():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def both(tmp_path: Path, stage: int, precision: str, **deepspeed: object) -> Step:
    settings = (FETCHED if stage == 3 else {}) | deepspeed
    config = experiment(tmp_path, **SETTINGS, deepspeed=settings)
    first, second = processes.on_ranks(second_step, 2, tmp_path / "log", config, stage, precision)
    assert first == second
    print(stage, precision, first)
    return first


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_gathers_and_reduces_as_many_elements_in_half_the_bytes(tmp_path: Path, stage: int) -> None:
    full, half = (both(tmp_path, stage, precision) for precision in ("fp32", "bf16"))
    for before, after in ((full.gathered, half.gathered), (full.reduced, half.reduced)):
        assert set(before) == {torch.float32} and set(after) == {torch.bfloat16}
        assert after[torch.bfloat16] == before[torch.float32] > 0
    assert half.weights * 2 == full.weights
    model = TransformerLM(**load_config(tmp_path / "config.yaml").model.model_dump(), device=torch.device("meta"))
    elements = sum(p.numel() for p in model.parameters())
    held = elements / 2 if stage == 3 else elements
    assert half.weights == pytest.approx(2 * held, rel=0.02), "but for padding, two bytes per weight"


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_can_be_reduced_in_float32_and_weights_gathered_in_bf16(tmp_path: Path, stage: int) -> None:
    half, mixed = both(tmp_path, stage, "bf16"), both(tmp_path, stage, "bf16", communication_data_type="fp32")
    assert mixed.gathered == half.gathered
    assert mixed.reduced == {torch.float32: half.reduced[torch.bfloat16]}
    assert mixed.weights == half.weights


def test_one_rank_copies_its_gradients_for_no_reduction(tmp_path: Path) -> None:
    config = experiment(tmp_path, **{**SETTINGS, "train.batch_size": 4})
    (alone,) = processes.on_ranks(second_step, 1, tmp_path / "log", config, 0, "fp32")
    assert (alone.gathered, alone.reduced) == ({}, {})
    first, second = processes.on_ranks(second_step, 2, tmp_path / "log", experiment(tmp_path, **SETTINGS), 0, "fp32")
    assert first == second and first.reduced[torch.float32] * 4 == first.weights
