"""Training, validation and resuming with a document mask: each document as if it were alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import pipeline.train.loop as loop
from pipeline.config.sections import Config
from pipeline.data.dataset import open_dataset
from pipeline.data.order.batches import BatchReader
from pipeline.data.order.documents import document_starts
from pipeline.data.order.validation import validation_windows
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import run_for
from pipeline.train.evaluate import evaluate_run
from pipeline.train.model import load_model
from tests.experiment import curve, lines
from tests.train.engine.reference import new_model
from tests.train.tiny import tiny

CONTEXT = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Documents of 1 to 30 tokens, some longer than a window."""
    folder = tmp_path_factory.mktemp("documents")
    rng = random.Random(5)
    sources = []
    for name, count in (("train", 400), ("validation", 60)):
        texts = ["".join(rng.choices("etaoin", k=rng.randint(1, 30))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("|".join(texts))
        sources.append({"name": name, "paths": [str(folder / f"{name}.txt")], "split": name, "separator": "|"})
    return tiny(folder, **{"data.sources": sources, "model.document_mask": True, "train.max_iters": 8,
                           "train.val_interval": 4, "train.checkpoint_interval": 4})  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: Config) -> Path:
    loop.train(config)
    return run_for(config).path


def loss_alone(model: TransformerLM, x: torch.Tensor, y: torch.Tensor, end: int) -> float:
    """The mean loss of windows whose documents are read one by one, found by the end-of-text tokens."""
    total = 0.0
    for ids, targets in zip(x, y, strict=True):
        borders = [0, *(i + 1 for i, token in enumerate(ids.tolist()) if token == end and i + 1 < len(ids)), len(ids)]
        for a, b in itertools.pairwise(borders):
            with torch.no_grad():
                logits = model(ids[None, a:b])
            total += float(functional.cross_entropy(logits[0].double(), targets[a:b], reduction="sum"))
    return total / y.numel()


def test_the_reader_says_where_the_documents_of_a_batch_start(config: Config) -> None:
    dataset = open_dataset(config.data.path, "train")
    end = dataset.manifest.end_of_text_id
    readers = [
        BatchReader(dataset, config.data, seed=1, context_length=CONTEXT, batch_size=8, document_starts=told)
        for told in (True, False)
    ]
    (x, y, starts), (plain_x, plain_y) = (reader.batch(3, 2, 7) for reader in readers)
    assert torch.equal(x, plain_x) and torch.equal(y, plain_y) and starts.dtype == torch.int64
    for ids, found in zip(x.tolist(), starts.tolist(), strict=True):
        expected, begin = [], 0
        for place, token in enumerate(ids):
            expected.append(begin)
            begin = place + 1 if token == end else begin
        assert found == expected
    assert document_starts(torch.tensor([[end, end, 5]]), end).tolist() == [[0, 1, 2]]


def test_the_first_loss_is_that_of_the_documents_read_one_by_one(config: Config, trained: Path) -> None:
    dataset = open_dataset(config.data.path, "train")
    reader = BatchReader(dataset, config.data, seed=config.train.seed, context_length=CONTEXT, batch_size=4)
    x, y = reader.batch(0, 0, 4)
    model, end = new_model(config), dataset.manifest.end_of_text_id
    assert curve(trained)[0][1] == pytest.approx(loss_alone(model, x, y, end), rel=1e-6)
    with torch.no_grad():
        whole = float(functional.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    assert whole != pytest.approx(curve(trained)[0][1], rel=1e-5)


def test_validation_reads_the_documents_one_by_one_too(config: Config, trained: Path) -> None:
    dataset = open_dataset(config.data.path, "validation")
    (windows,) = validation_windows(dataset, CONTEXT)
    x, y = windows.batch(0, windows.count)
    model = load_model(config, trained / "checkpoints" / "step_00000008")
    expected = pytest.approx(loss_alone(model, x, y, dataset.manifest.end_of_text_id), rel=1e-6)
    assert [line["val/loss"] for line in lines(trained / "metrics.jsonl") if "val/loss" in line][-1] == expected
    assert evaluate_run(run_for(config)).loss == expected


def test_a_resumed_run_repeats_every_bit(config: Config, trained: Path) -> None:
    for steps in (4, 8):
        train = config.train.model_copy(update={"max_iters": steps})
        loop.train(config.model_copy(update={"name": "resumed", "train": train}))
    assert curve(trained.parent / "resumed") == curve(trained)


def test_rows_that_are_padded_or_full_change_nothing(config: Config) -> None:
    """A rank pads its last chunk: the documents of the real rows are the same."""
    model = new_model(config)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 257, (3, CONTEXT)))
    starts = document_starts(ids, 256)
    padded = functional.pad(ids, (0, 0, 0, 2)), functional.pad(starts, (0, 0, 0, 2))
    with torch.no_grad():
        torch.testing.assert_close(model(padded[0], document_starts=padded[1])[:3], model(ids, document_starts=starts))
