"""One engine and the steps that it takes on made-up tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from pipeline.config.load import parse_config
from pipeline.config.sections import Config
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.engine.step_numbers import PendingNumbers

SEED = 1337
LEARNING_RATE = 1e-3

TINY = {"vocab_size": 512, "context_length": 64, "d_model": 64, "num_layers": 2, "num_heads": 2, "d_ff": 176}
"""For what does not depend on the size."""


@dataclass(frozen=True)
class Size:
    """A model to be timed, and the batch it is timed with."""

    name: str
    model: dict[str, Any]
    micro_batch: int
    """Sequences per forward pass."""


def _shape(d_model: int, num_layers: int, head_dim: int = 64) -> dict[str, Any]:
    d_ff = -(-8 * d_model // 3 // 128) * 128
    heads = d_model // head_dim
    return {
        "vocab_size": 32768, "context_length": 2048, "d_model": d_model, "num_layers": num_layers,
        "num_heads": heads, "d_ff": d_ff,
    }  # fmt: skip


SIZES = [
    Size("125M", _shape(768, 12), 16),
    Size("350M", _shape(1024, 24), 16),
    Size("1B", _shape(2048, 16, 128), 8),
]


def config_of(model: dict[str, Any], micro_batch: int, micro_batches: int = 1, **train: Any) -> Config:
    """Returns an experiment of one process; its data and its schedule are never used."""
    tree = {
        "name": "gpu",
        "data": {"path": "unused", "sources": [{"name": "unused", "paths": ["unused"], "split": "train"}]},
        "model": {"rope_theta": 10000.0, **model},
        "optimizer": {
            "learning_rate": LEARNING_RATE, "min_learning_rate": 1e-4, "warmup_iters": 1, "cosine_cycle_iters": 10,
        },
        "train": {
            "batch_size": micro_batch * micro_batches, "micro_batch_size": micro_batch, "max_iters": 10, **train,
        },
    }  # fmt: skip
    return parse_config(yaml.safe_dump(tree), source="benchmarks.gpu", world_size=1)


class Case:
    """An engine with fresh weights; made-up tokens that repeat, so that there is something to learn."""

    def __init__(self, config: Config, device: torch.device) -> None:
        began = time.monotonic()
        self.config = config
        self.engine = Engine(config, World(), device)
        self.engine.draw(SEED)
        self.start_s = time.monotonic() - began
        self.steps = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the micro-batches of the next step, on the device."""
        train, model = self.config.train, self.config.model
        generator = torch.Generator().manual_seed(self.steps % 4)
        shape = (train.batch_size, model.context_length + 1)
        ids = torch.randint(model.vocab_size, shape, generator=generator).to(self.engine.device)
        for rows in ids.split(train.micro_batch_size):
            yield rows[:, :-1], rows[:, 1:]

    def step(
        self,
        batches: list[tuple[Tensor, Tensor]] | None = None,
        before_update: Callable[[], object] = lambda: None,
    ) -> PendingNumbers:
        """Takes one step of the training loop, on given micro-batches or on the next.

        Args:
            batches: The micro-batches.
            before_update: Called right before weights change, as the loop waits there for a save's copy.
        """
        engine = self.engine
        engine.set_learning_rate(LEARNING_RATE)
        engine.zero_grad()
        losses = []
        for x, y in batches or self.batches():
            loss, cross_entropy = engine.loss(x, y)
            engine.backward(loss)
            losses.append(cross_entropy)
        numbers = engine.reduce_and_clip(1.0, losses, stop=False)
        before_update()
        engine.step()
        self.steps += 1
        return numbers

    def losses(self, steps: int) -> list[float]:
        """Takes steps and returns their losses."""
        return [number.read().loss for number in [self.step() for _ in range(steps)]]

    def state(self) -> dict[str, Tensor]:
        """Returns copies of weights and moments on the host."""
        return {
            f"{k}/{f.name}": t.detach().cpu().clone() for f in self.engine.fragments() for k, t in f.tensors.items()
        }

    def close(self) -> None:
        """Gives the memory back."""
        self.engine._engine.destroy()
        del self.engine
