"""An experiment that one process trains in about a second, and faults that can be injected into it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.build.display import prepare_here
from pipeline.model.chunked_loss import LossParts
from pipeline.train.engine.engine import Engine
from tests.test_bad_input import experiment

_WHOLE = Engine.loss


def spoiling(at: set[int], factor: float) -> Callable[[Engine, torch.Tensor, torch.Tensor], LossParts]:
    """Stands in for `Engine.loss` and spoils it when it is called for the n-th time."""
    calls = itertools.count(1)

    def loss(engine: Engine, x: torch.Tensor, y: torch.Tensor) -> LossParts:
        spoilt = factor if next(calls) in at else 1.0
        return LossParts(*(part * spoilt for part in _WHOLE(engine, x, y)))

    return loss


def tiny(folder: Path, **changes: Any) -> Config:
    settings = {
        "train.max_iters": 40, "train.log_interval": 1, "train.val_interval": 1000, "train.checkpoint_interval": 10,
        "optimizer.cosine_cycle_iters": 40, "optimizer.learning_rate": 1e-3, "optimizer.min_learning_rate": 1e-4,
    }  # fmt: skip
    config = load_config(experiment(folder, **settings | changes))
    prepare_here(config, None)
    return config
