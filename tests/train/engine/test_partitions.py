"""At every ZeRO stage the fragments are the optimizer's own tensors, and a load reaches what training uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config.load import load_config
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.fresh import fill_fresh
from pipeline.train.engine.partitions import PARTITIONS
from pipeline.train.ranks import group
from tests import processes
from tests.test_bad_input import experiment

CPU = torch.device("cpu")
# Stage 2 does what stage 1 does, and more.
STAGES = pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """A process group of this process."""
    with group.process_group(World(), CPU):
        yield


def new_engine(folder: Path, stage: int, seed: int = 0, **changes: Any) -> Engine:
    settings = {"train.zero_stage": stage, "train.batch_size": 8, "train.micro_batch_size": 4}
    config = load_config(experiment(folder, **settings | changes))
    engine = Engine(config, World(), CPU)
    engine.draw(seed)
    return engine


def train_step(engine: Engine, seed: int, lr: float = 1e-2, scale: float = 1.0, max_norm: float = 1.0) -> Any:
    """One step of two micro-batches; its numbers."""
    ids = torch.randint(257, (2, 4, 17), generator=torch.Generator().manual_seed(seed))
    engine.set_learning_rate(lr)
    engine.zero_grad()
    losses = []
    for micro in ids:
        loss, entropy = engine.loss(micro[:, :-1], micro[:, 1:])
        engine.backward(scale * loss)
        losses.append(scale * entropy)
    numbers = engine.reduce_and_clip(max_norm, losses, stop=False)
    engine.step()
    return numbers.read()


def state(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{key}/{f.name}": t.clone() for f in engine.fragments() for key, t in f.tensors.items()}


class Reader:
    """Stands in for a checkpoint that holds what `state` returned."""

    def __init__(self, found: dict[str, torch.Tensor], steps: int) -> None:
        self._found = found
        self.manifest = SimpleNamespace(state={"optimizer_steps": steps})

    def read(self, key: str, name: str, start: int, out: torch.Tensor) -> None:
        out.copy_(self._found[f"{key}/{name}"][start : start + out.numel()])


@STAGES
def test_alone_a_rank_owns_every_element_of_every_parameter(tmp_path: Path, stage: int) -> None:
    engine = new_engine(tmp_path, stage)
    model = TransformerLM(**load_config(tmp_path / "config.yaml").model.model_dump())
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    fragments = {f.name: f for f in engine.fragments()}
    assert {name: f.shape for name, f in fragments.items()} == shapes
    for name, f in fragments.items():
        assert f.start == 0 and f.length == torch.Size(shapes[name]).numel()
        assert {t.dtype for t in f.tensors.values()} == {torch.float32}
        assert set(f.tensors) == {"weight", "exp_avg", "exp_avg_sq"}
        assert not f.tensors["exp_avg"].any(), "moments are zero before the first step"
    assert engine.optimizer_steps == 0


@STAGES
def test_fragments_are_views_of_what_the_optimizer_updates(tmp_path: Path, stage: int) -> None:
    engine = new_engine(tmp_path, stage)
    fragments, before = engine.fragments(), state(engine)
    train_step(engine, 1)
    for f in fragments:
        for key, tensor in f.tensors.items():
            assert not torch.equal(tensor, before[f"{key}/{f.name}"]), (f.name, key)
    assert engine.optimizer_steps == 1


@STAGES
def test_a_loaded_engine_takes_the_same_next_step(tmp_path: Path, stage: int) -> None:
    """Weights, moments and the step count reach the working weights and the optimizer."""
    first = new_engine(tmp_path, stage)
    for seed in (1, 2):
        train_step(first, seed)
    saved = state(first)
    second = new_engine(tmp_path, stage, seed=9)
    second.load(Reader(saved, 2))  # type: ignore[arg-type]
    assert second.optimizer_steps == 2
    assert train_step(second, 3) == train_step(first, 3)
    ours, theirs = state(first), state(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_all_stages_take_the_same_steps(tmp_path: Path) -> None:
    curves = []
    for stage in (0, 1, 2, 3):
        engine = new_engine(tmp_path, stage)
        curves.append([train_step(engine, seed).loss for seed in (1, 2, 3)])
    assert curves[1:] == [pytest.approx(curves[0], rel=1e-6)] * 3


@pytest.mark.parametrize(
    ("stage", "spoilt", "precision"),
    [
        (0, math.nan, "fp32"), (0, math.inf, "bf16"), (1, math.nan, "bf16"),
        (2, math.inf, "fp32"), (2, math.inf, "bf16"), (3, math.nan, "fp32"), (3, math.inf, "bf16"),
    ],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, stage: int, spoilt: float, precision: str) -> None:
    engine = new_engine(tmp_path, stage, **{"train.precision": precision})
    train_step(engine, 1)
    before = state(engine)
    train_step(engine, 2, scale=spoilt)
    after = state(engine)
    assert engine.optimizer_steps == 1
    assert all(torch.equal(before[name], after[name]) for name in before)
    train_step(engine, 3)
    assert engine.optimizer_steps == 2, "the next step counts again"


@STAGES
def test_the_norm_is_that_before_clipping_and_the_gradients_are_clipped(tmp_path: Path, stage: int) -> None:
    """After one step the first moment is a tenth of the clipped gradient."""
    engine = new_engine(tmp_path, stage, **{"optimizer.betas": [0.9, 0.95]})
    norm = train_step(engine, 1, max_norm=0.25).norm
    moments = torch.cat([t for name, t in state(engine).items() if name.startswith("exp_avg/")])
    assert norm > 0.3
    assert float(moments.norm()) == pytest.approx(0.1 * 0.25, rel=1e-4)

    whole = new_engine(tmp_path, stage, **{"optimizer.betas": [0.9, 0.95]})
    assert train_step(whole, 1, max_norm=0.0).norm == pytest.approx(norm, rel=1e-6)
    moments = torch.cat([t for name, t in state(whole).items() if name.startswith("exp_avg/")])
    assert float(moments.norm()) == pytest.approx(0.1 * norm, rel=1e-4), "0 clips nothing"


@pytest.mark.parametrize("stage", [1, 3])
def test_an_offloaded_optimizer_takes_the_same_step(tmp_path: Path, stage: int) -> None:
    there, here = new_engine(tmp_path, stage, **{"train.offload_optimizer": True}), new_engine(tmp_path, stage)
    assert train_step(there, 1).norm == pytest.approx(train_step(here, 1).norm, rel=1e-6)
    assert train_step(there, 2).loss == pytest.approx(train_step(here, 2).loss, rel=1e-6)


@STAGES
def test_bf16_computes_in_bfloat16_and_keeps_float32_masters(tmp_path: Path, stage: int) -> None:
    engine = new_engine(tmp_path, stage, **{"train.precision": "bf16", "train.micro_batch_size": 8})
    computed: list[torch.Tensor] = []
    engine.module.layers[0].attn.q_proj.register_forward_hook(lambda module, inputs, output: computed.append(output))
    engine.loss(torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, 4, dtype=torch.long))
    assert computed[0].dtype == torch.bfloat16
    assert {t.dtype for t in state(engine).values()} == {torch.float32}
    working = torch.bfloat16 if stage else torch.float32
    assert {p.dtype for p in engine.module.parameters()} == {working}
    assert {b.dtype for b in engine.module.buffers()} == {torch.float32}, "the tables of the positions stay exact"


@STAGES
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fresh_masters_are_not_rounded_to_the_working_dtype(tmp_path: Path, stage: int, precision: str) -> None:
    engine = new_engine(tmp_path, stage, 5, **{"train.precision": precision, "train.micro_batch_size": 8})
    for f in engine.fragments():
        whole = torch.empty(math.prod(f.shape))
        fill_fresh(whole, f.name, f.shape, 5)
        assert torch.equal(f.tensors["weight"], whole), f.name


@pytest.mark.parametrize(("size", "numel"), [(1, 10), (2, 10), (4, 10), (3, 2), (8, 3)])
def test_at_stage_0_the_ranks_share_every_parameter(size: int, numel: int) -> None:
    """Together every element once, in the order of the ranks; a rank may own nothing of a small parameter."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.arange(float(numel)))
    found: list[float] = []
    for rank in range(size):
        optimizer = AdamW(model.parameters(), lr=1.0)
        partitions = PARTITIONS[0](None, model, optimizer, World(rank=rank, size=size), CPU, False)  # type: ignore[arg-type]
        for fragment in partitions.owned():
            assert fragment.start == len(found)
            found += fragment.tensors["weight"].tolist()
        (held,) = partitions.held()
        assert (held.start, held.length) == (0, numel)
    assert found == [float(i) for i in range(numel)]


@pytest.mark.parametrize(("size", "part"), [(1, 10), (4, 3), (8, 2)])
def test_at_stage_3_the_padding_of_the_last_partitions_belongs_to_nobody(size: int, part: int) -> None:
    """Ten elements; every rank's flat tensor holds two of another parameter first."""
    found: list[float] = []
    for rank in range(size):
        flat = torch.full((2 + part,), -1.0)
        mine = range(rank * part, min((rank + 1) * part, 10))
        flat[2 : 2 + len(mine)] = torch.tensor([float(i) for i in mine])
        zero = SimpleNamespace(
            grad_position={7: (0, 2, part)}, get_param_id=lambda parameter: 7, fp32_partitioned_groups_flat=[flat]
        )
        optimizer = SimpleNamespace(state={flat: {"exp_avg": flat, "exp_avg_sq": flat}})
        partitions = PARTITIONS[3](zero, None, optimizer, World(rank=rank, size=size), CPU, False)  # type: ignore[arg-type]
        fragment = partitions._fragment("w", SimpleNamespace(ds_numel=10, ds_shape=(2, 5)))  # type: ignore[arg-type]
        if fragment is None:
            assert not mine
            continue
        assert (fragment.start, fragment.shape) == (len(found), (2, 5))
        found += fragment.tensors["weight"].tolist()
    assert found == [float(i) for i in range(10)]


def two_ranks(world: World, config_file: str, stage: int) -> tuple[float, float, bool]:
    """The numbers of one step on the same micro-batch on both ranks, of which rank 1 was asked to stop."""
    config = load_config(config_file, [f"train.zero_stage={stage}", "train.batch_size=8", "train.micro_batch_size=4"])
    torch.manual_seed(0)
    engine = Engine(config, world, CPU)
    engine.draw(0)
    ids = torch.randint(257, (4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(2 // world.size):
        loss, _ = engine.loss(ids[:, :-1], ids[:, 1:])
        engine.backward(loss)
        losses.append(loss.detach())
    numbers = engine.reduce_and_clip(1.0, losses, stop=world.rank == 1).read()
    return numbers.loss, numbers.norm, numbers.stop


@pytest.mark.parametrize("stage", [0, 2])
def test_ranks_agree_on_the_numbers_of_the_whole_batch(tmp_path: Path, stage: int) -> None:
    config = experiment(tmp_path)
    loss, norm, stop = two_ranks(World(), config, stage)
    assert stop is False
    first, second = processes.on_ranks(two_ranks, 2, tmp_path / "log", config, stage)
    assert first == second == (pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5), True)
