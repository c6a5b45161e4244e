"""The bigram baseline is what counting by hand gives."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from pipeline.config.sections import Config
from pipeline.data.baseline import bigram_loss
from pipeline.data.dataset import TokenDataset, open_splits

CONTEXT, VOCABULARY = 16, 257


def test_the_bigram_baseline_equals_counting_by_hand(made: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = open_splits(made.data.path)
    train, validation = (_tokens(splits[name]) for name in ("train", "validation"))
    expected = _by_hand(train, validation)
    assert bigram_loss(splits["train"], splits["validation"], CONTEXT, VOCABULARY) == pytest.approx(expected, abs=1e-9)
    monkeypatch.setattr("pipeline.data.baseline._PIECE", 100)
    assert bigram_loss(splits["train"], splits["validation"], CONTEXT, VOCABULARY) == pytest.approx(expected, abs=1e-9)
    few = bigram_loss(splits["train"], splits["validation"], CONTEXT, VOCABULARY, max_tokens=500)
    assert few == pytest.approx(_by_hand(train[:500], validation), abs=1e-9)


def _tokens(dataset: TokenDataset) -> list[int]:
    return list(dataset.stream.gather(np.array([0]), len(dataset))[0].tolist())


def _by_hand(train: list[int], validation: list[int]) -> float:
    pairs, firsts, targets = Counter(itertools.pairwise(train)), Counter(train[:-1]), Counter(train[1:])
    total = len(train) - 1 + VOCABULARY
    scored = (len(validation) - 1) // CONTEXT * CONTEXT
    best = math.inf
    for s in (1, 3, 10, 30, 100, 300, 1000, 3000):
        nats = 0.0
        for a, b in itertools.pairwise(validation[: scored + 1]):
            nats -= math.log((pairs[a, b] + s * (targets[b] + 1) / total) / (firsts[a] + s))
        best = min(best, nats / scored)
    return best
