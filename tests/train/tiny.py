"""An experiment that one process trains in about a second, and faults that can be injected into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.build.display import prepare_here
from pipeline.model.loss import cross_entropy
from tests.test_bad_input import experiment


class Sabotage:
    """Stands in for the loss and spoils it when it is called for the n-th time."""

    def __init__(self, at: set[int], factor: float) -> None:
        self.at, self.factor, self.calls = at, factor, 0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = cross_entropy(logits, targets)
        return loss * self.factor if self.calls in self.at else loss


def tiny(folder: Path, **changes: Any) -> Config:
    settings = {
        "train.max_iters": 40, "train.log_interval": 1, "train.val_interval": 1000, "train.checkpoint_interval": 10,
        "optimizer.cosine_cycle_iters": 40, "optimizer.learning_rate": 1e-3, "optimizer.min_learning_rate": 1e-4,
    }  # fmt: skip
    config = load_config(experiment(folder, **settings | changes))
    prepare_here(config, None)
    return config
