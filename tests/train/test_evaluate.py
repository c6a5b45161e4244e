"""The validation loss: what plain arithmetic gives, and one number whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from pipeline.config.load import load_config
from pipeline.data.dataset import open_dataset, validation_windows
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.evaluate import Validation, evaluate
from tests import processes
from tests.train.conftest import Lab
from tests.train.engine.reference import new_model

# Seven chunks of three windows and one of a single window: no number of ranks above one shares them evenly.
WINDOWS, CHUNK = 22, 3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def evaluated(world: World, config_file: str, stage: int) -> dict[str, Any]:
    """The evaluation of the fresh model, as training does it."""
    config = load_config(config_file, [f"train.zero_stage={stage}"])
    dataset = open_dataset(config.data.path, "validation")
    windows = validation_windows(dataset, config.model.context_length)
    engine = Engine(new_model(config), config, world, torch.device("cpu"))
    found = evaluate(engine, Validation(dataset, windows, WINDOWS, CHUNK, world, engine.device), step=0)
    return asdict(found)


@pytest.fixture(scope="module")
def alone(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process at ZeRO-0 finds."""
    log = tmp_path_factory.mktemp("evaluated") / "log"
    return processes.on_ranks(evaluated, 1, log, str(lab.config("evaluated")), 0)[0]


@pytest.mark.parametrize(("world", "stage"), [(1, 3), (2, 0), (2, 3), (4, 0), (4, 3)])
def test_every_rank_finds_the_same_bits_at_any_number_of_ranks(
    lab: Lab, tmp_path: Path, alone: dict[str, Any], world: int, stage: int
) -> None:
    found = processes.on_ranks(evaluated, world, tmp_path / "log", str(lab.config("evaluated")), stage)
    assert found == [alone] * world


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
