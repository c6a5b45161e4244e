"""Training on packed windows: padding counts nowhere, and whoever makes the index, the curve is the same."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import pipeline.train.loop as loop
from pipeline.config.sections import Config
from pipeline.data.dataset import open_dataset
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.packing import load_packing, packing_folder
from pipeline.errors import UsageError
from pipeline.run.folder import run_for
from tests.experiment import curve
from tests.train.engine.reference import new_model
from tests.train.tiny import tiny

CONTEXT = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Documents of 2 to 30 tokens; `pipeline prepare` packs them."""
    folder = tmp_path_factory.mktemp("packed")
    rng = random.Random(5)
    sources = []
    for name, count in (("train", 300), ("validation", 60)):
        texts = ["".join(rng.choices("etaoin", k=rng.choice([3, 10, 11, 12, 29]))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("|".join(texts))
        sources.append({"name": name, "paths": [str(folder / f"{name}.txt")], "split": name, "separator": "|"})
    return tiny(folder, **{"data.sources": sources, "data.packing": "best_fit", "model.document_mask": True,
                           "train.max_iters": 8, "train.checkpoint_interval": 4})  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: Config) -> Path:
    loop.train(config)
    return run_for(config).path


def test_prepare_packs_and_the_first_loss_counts_tokens_only(config: Config, trained: Path) -> None:
    dataset = open_dataset(config.data.path, "train")
    assert load_packing(Path(config.data.path), dataset.manifest, CONTEXT + 1).windows.keys() == {"train"}
    reader = BatchReader(dataset, config.data, seed=config.train.seed, context_length=CONTEXT, batch_size=4,
                         document_starts=True)  # fmt: skip
    x, y, starts = reader.batch(0, 0, 4)
    assert (y < 0).any(), "a window is padded"
    model = new_model(config)
    with torch.no_grad():
        logits = model(x, document_starts=starts)
    losses = functional.cross_entropy(logits.flatten(0, 1), y.clamp(min=0).flatten(), reduction="none")
    assert curve(trained)[0][1] == pytest.approx(float(losses[(y >= 0).flatten()].mean()), rel=1e-6)


def test_a_start_packs_where_prepare_has_not_and_a_resumed_run_repeats_every_bit(config: Config, trained: Path) -> None:
    shutil.rmtree(packing_folder(Path(config.data.path), CONTEXT + 1))
    for steps in (4, 8):
        train = config.train.model_copy(update={"max_iters": steps})
        loop.train(config.model_copy(update={"name": "resumed", "train": train}))
    assert curve(trained.parent / "resumed") == curve(trained)


def test_the_loss_is_the_mean_over_the_tokens_of_the_global_batch_however_it_is_divided(
    config: Config, trained: Path
) -> None:
    train = config.train.model_copy(update={"micro_batch_size": 1})
    loop.train(config.model_copy(update={"name": "divided", "train": train}))
    ours, theirs = curve(trained.parent / "divided"), curve(trained)
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-5)


def test_a_run_keeps_its_packing(config: Config, trained: Path) -> None:
    other = config.model_copy(update={"data": config.data.model_copy(update={"packing": "concat"})})
    with pytest.raises(UsageError, match=r"data\.packing"):
        loop.train(other)
