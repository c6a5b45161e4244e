"""The validation loss: what plain arithmetic gives, and one number whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional

from pipeline.config.load import load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.order.validation import validation_windows
from pipeline.model.chunked_loss import IGNORED, LossParts
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.evaluate import Validation, evaluate
from tests import processes
from tests.train.conftest import Lab
from tests.train.engine.reference import new_model

# Seven chunks of three windows and one of a single window: no number of ranks above one shares them evenly.
WINDOWS, CHUNK = 22, 3


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> LossParts:
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return LossParts(loss, loss)


class Uniform:
    """Gives the first three tokens of the vocabulary the same logit and the rest none; notes its inputs' shapes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, ids: torch.Tensor, targets: torch.Tensor) -> LossParts:
        self.shapes.append(tuple(ids.shape))
        logits = torch.full((*ids.shape, 8), -1e9)
        logits[..., :3] = 0.0
        return loss_of(logits, targets)


class Windows:
    """Seven windows of four tokens in 0 ... 2, of a text of 60 bytes; the targets of window i are i % 3."""

    name, count, tokens, bytes = "text", 7, 30, 60

    def targets(self, start: int, stop: int) -> int:
        return 4 * (stop - start)

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(start, stop).unsqueeze(1).expand(-1, 4) % 3
        return rows, rows


def fake_validation(count: int, chunk: int, world: World) -> Validation:
    return Validation((Windows(),), count, chunk, world, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "tokens"), [(7, 28), (100, 28), (5, 20), (1, 4)])
def test_a_model_that_is_undecided_between_three_tokens_has_perplexity_three(count: int, tokens: int) -> None:
    found = evaluate(Uniform(), fake_validation(count, 2, World()), step=9)
    assert (found.step, found.tokens) == (9, tokens)
    assert found.loss == pytest.approx(math.log(3))
    assert found.perplexity == pytest.approx(3.0)
    assert found.bits_per_byte == pytest.approx(math.log2(3) / 2), "two bytes per token"


@pytest.mark.parametrize(("size", "chunk", "turns"), [(1, 2, 4), (2, 2, 2), (3, 2, 2), (4, 2, 1), (5, 2, 1), (2, 7, 1)])
def test_every_rank_calls_the_model_equally_often_and_each_chunk_counts_once(
    monkeypatch: pytest.MonkeyPatch, size: int, chunk: int, turns: int
) -> None:
    """ZeRO-3 gathers weights in every call: the other ranks hang if one leaves a call out."""
    shares: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda sums: shares.append(sums.clone()))
    models = [Uniform() for _ in range(size)]
    for rank, model in enumerate(models):
        evaluate(model, fake_validation(7, chunk, World(rank=rank, size=size)), step=0)
    assert [model.shapes for model in models] == [[(chunk, 4)] * turns] * size, "another shape is compiled again"
    if size > 1:
        assert ((torch.stack(shares) != 0).sum(0) == 1).all(), "each chunk is counted once"
        assert float(torch.stack(shares).sum()) == pytest.approx(28 * math.log(3))


class Other(Windows):
    """Four windows of four tokens, with twice as many bytes per token."""

    name, count, tokens, bytes = "other", 4, 10, 40


def test_each_source_has_its_own_windows_and_the_whole_is_weighted_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers whichever ranks share the chunks; the limit holds for each source."""
    shares: list[torch.Tensor] = []
    calls = iter(range(1000))

    def falling(ids: torch.Tensor, targets: torch.Tensor) -> LossParts:
        loss = torch.tensor(1.0 + ids.shape[0] * next(calls))
        return LossParts(loss, loss)

    sources = (Windows(), Other())
    alone = evaluate(falling, Validation(sources, 5, 2, World(), torch.device("cpu")), step=0)  # type: ignore[arg-type]
    # Chunks of 2, 2, 1 and of 2, 2 windows with losses 1, 3, 5, 7, 9.
    assert {name: (found.loss, found.tokens) for name, found in alone.sources.items()} == {
        "text": (pytest.approx((2 * 1 + 2 * 3 + 5) / 5), 20),
        "other": (pytest.approx(8.0), 16),
    }
    assert alone.sources["other"].bits_per_byte == pytest.approx(8.0 / math.log(2) / 4)
    assert alone.tokens == 36 and alone.loss == pytest.approx((30 * 2.6 + 10 * 8.0) / 40)
    assert alone.bits_per_byte == pytest.approx(alone.loss / math.log(2) * 40 / 100)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: shares.append(sums.clone()))
    for rank in range(3):
        calls = iter([rank, rank + 3])
        validation = Validation(sources, 5, 2, World(rank=rank, size=3), torch.device("cpu"))  # type: ignore[arg-type]
        evaluate(falling, validation, step=0)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.copy_(torch.stack(shares).sum(0)))
    calls = iter(range(1000))
    three = Validation(sources, 5, 2, World(rank=2, size=3), torch.device("cpu"))  # type: ignore[arg-type]
    assert evaluate(falling, three, step=0) == alone


def test_a_loss_too_large_for_a_perplexity_is_still_a_number() -> None:
    def sure_and_wrong(ids: torch.Tensor, targets: torch.Tensor) -> LossParts:
        return loss_of(functional.one_hot(torch.full_like(ids, 7), 8) * 1e4, targets)

    found = evaluate(sure_and_wrong, fake_validation(7, 2, World()), step=0)
    assert found.loss == pytest.approx(1e4) and found.perplexity == pytest.approx(math.exp(700))


# ---- real ranks ------------------------------------------------------------------------------------


def evaluated(world: World, config_file: str, stage: int) -> dict[str, Any]:
    """The evaluation of the fresh model, as training does it."""
    config = load_config(config_file, [f"train.zero_stage={stage}"])
    dataset = open_dataset(config.data.path, "validation")
    windows = validation_windows(dataset, config.model.context_length)
    engine = Engine(config, world, torch.device("cpu"))
    engine.draw(config.train.seed)
    found = evaluate(engine.loss, Validation(windows, WINDOWS, CHUNK, world, engine.device), step=0)
    return asdict(found)


@pytest.fixture(scope="module")
def alone(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process at ZeRO-0 finds."""
    log = tmp_path_factory.mktemp("evaluated") / "log"
    return processes.on_ranks(evaluated, 1, log, str(lab.config("evaluated")), 0)[0]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 0), (2, 3), (4, 0), (4, 3)])
def test_every_rank_finds_the_same_bits_at_any_number_of_ranks(
    lab: Lab, tmp_path: Path, alone: dict[str, Any], world: int, stage: int
) -> None:
    found = processes.on_ranks(evaluated, world, tmp_path / "log", str(lab.config("evaluated")), stage)
    assert found == [alone] * world


@pytest.mark.slow
def test_loss_perplexity_and_bits_are_those_of_the_text_read_at_once(lab: Lab, alone: dict[str, Any]) -> None:
    config = load_config(lab.config("evaluated"))
    text = Path(next(s for s in config.data.sources if s.split == "validation").paths[0]).read_bytes()
    context = config.model.context_length
    tokens = torch.tensor(list(text[: WINDOWS * context + 1]))
    with torch.no_grad():
        logits = new_model(config)(tokens[:-1].view(WINDOWS, context))
    loss = float(functional.cross_entropy(logits.flatten(0, 1).double(), tokens[1:]))
    assert alone["tokens"] == WINDOWS * context
    assert alone["loss"] == pytest.approx(loss, rel=1e-6)
    assert alone["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    # A token a byte, and one more at the document's end.
    assert alone["bits_per_byte"] == pytest.approx(loss / math.log(2) * (len(text) + 1) / len(text), rel=1e-6)
