"""Every architecture trains alike at every ZeRO stage, and a tied weight is one weight wherever it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.huggingface.open_weights import OpenWeights
from pipeline.optim.adamw import decay_groups
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.fresh import fill_fresh
from pipeline.train.ranks import group
from tests import processes
from tests.huggingface.folders import written
from tests.test_bad_input import experiment
from tests.train.engine.test_partitions import Reader, new_engine, state, train_step

TIED: dict[str, Any] = {
    "model.num_heads": 4, "model.num_kv_heads": 2, "model.head_dim": 6, "model.tie_embeddings": True,
    "model.qkv_bias": True, "model.qk_norm": True,
    # Otherwise ZeRO-3 keeps so small parameters whole, and gathers none of them.
    "deepspeed.zero_optimization.stage3_param_persistence_threshold": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process."""
    with group.process_group(World(), torch.device("cpu")):
        yield


def test_all_stages_take_the_same_steps_with_a_tied_weight(tmp_path: Path) -> None:
    curves = []
    for stage in (0, 1, 2, 3):
        engine = new_engine(tmp_path, stage, **TIED)
        curves.append([train_step(engine, seed).loss for seed in (1, 2, 3)])
    assert curves[1:] == [pytest.approx(curves[0], rel=1e-6)] * 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_tied_model_resumes_bit_for_bit_with_one_fragment_for_both_uses(tmp_path: Path, stage: int) -> None:
    first = new_engine(tmp_path, stage, **TIED)
    for seed in range(10):
        train_step(first, seed)
    saved = state(first)
    assert "weight/token_embeddings.weight" in saved and "weight/lm_head.weight" not in saved
    second = new_engine(tmp_path, stage, seed=9, **TIED)
    second.load(Reader(saved, 10))  # type: ignore[arg-type]
    assert train_step(second, 11) == train_step(first, 11)
    ours, theirs = state(first), state(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(second.module.lm_head.parameters())


def test_a_tied_weight_decays_once_and_biases_and_gains_not_at_all(tmp_path: Path) -> None:
    model = new_engine(tmp_path, 0, **TIED).module
    decayed, plain = decay_groups(model, 0.1)
    assert sum(p is model.token_embeddings.weight for p in decayed["params"]) == 1
    names = {name for name, p in model.named_parameters() if any(p is other for other in plain["params"])}
    assert {name.split(".", 2)[-1] for name in names} >= {"attn.q_proj.bias", "attn.q_norm.weight"}


def test_biases_start_at_zero_gains_at_one_and_a_tied_weight_small() -> None:
    for name, value in (("layers.0.attn.q_proj.bias", 0.0), ("layers.0.attn.k_norm.weight", 1.0)):
        found = torch.full((8,), 7.0)
        fill_fresh(found, name, (8,), 0)
        assert found.tolist() == [value] * 8
    tied, untied = torch.empty(6400), torch.empty(6400)
    fill_fresh(tied, "token_embeddings.weight", (100, 64), 0, tied=True)
    fill_fresh(untied, "token_embeddings.weight", (100, 64), 0)
    torch.testing.assert_close(tied * 8, untied)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_of_a_folder_reach_the_masters_and_the_working_weights(
    tmp_path: Path, stage: int, precision: str
) -> None:
    engine = new_engine(tmp_path, stage, **{**TIED, "model.qkv_bias": False, "train.precision": precision})
    config = load_config(tmp_path / "config.yaml").model
    expected = written(tmp_path / "model", config)
    engine.take(OpenWeights(tmp_path / "model", config))
    found = state(engine)
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[f"weight/{name}"], parameter.detach().view(-1)), name
        assert not found[f"exp_avg/{name}"].any()
    if precision == "fp32":
        ids = torch.randint(257, (4, 16))
        with torch.no_grad():
            assert torch.equal(engine.loss(ids, ids).loss, expected(ids, targets=ids).loss)


def first_losses(world: World, config_file: str, stage: int) -> list[float]:
    """The losses of three steps whose micro-batches are the same whatever the number of ranks."""
    config = load_config(config_file, [f"train.zero_stage={stage}", "train.batch_size=8", "train.micro_batch_size=4"])
    engine = Engine(config, world, torch.device("cpu"))
    engine.draw(0)
    losses = []
    for seed in range(3):
        ids = torch.randint(257, (2, 4, 17), generator=torch.Generator().manual_seed(seed))
        engine.set_learning_rate(1e-2)
        engine.zero_grad()
        entropies = []
        for micro in ids[world.rank :: world.size]:
            loss, entropy = engine.loss(micro[:, :-1], micro[:, 1:])
            engine.backward(loss)
            entropies.append(entropy)
        losses.append(engine.reduce_and_clip(1.0, entropies, stop=False).read().loss)
        engine.step()
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_a_tied_model_as_one_does(tmp_path: Path, stage: int) -> None:
    config = experiment(tmp_path, **TIED)
    one = first_losses(World(), config, 0)
    for losses in processes.on_ranks(first_losses, 2, tmp_path / "log", config, stage):
        assert losses == pytest.approx(one, rel=1e-5)
