"""Measures a whole training step with and without the document mask, on one thread of a CPU.

Each batch has other documents; lengths are exponential, as those of web text roughly are.

python -m benchmarks.document_mask
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pipeline.model.documents as documents_of
from benchmarks.harness import refuse_arguments, save
from pipeline.config.load import load_config
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine
from pipeline.train.ranks.group import process_group

ROUNDS = 7
DEMO_CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
# Rows, mean length of a document, and the model.
DEMO = {"vocab_size": 4096, "context_length": 128, "d_model": 128, "num_layers": 4, "num_heads": 4, "d_ff": 344}
LARGER = {"vocab_size": 8192, "context_length": 1024, "d_model": 256, "num_layers": 8, "num_heads": 8, "d_ff": 688}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "demo, context 128": (8, 100, DEMO),
    "10M parameters, context 1024": (2, 300, LARGER),
}


def starts(rows: int, context: int, mean: int, generator: torch.Generator) -> Tensor:
    """Where the document of each token starts, if each token begins one with probability 1 / mean."""
    places = torch.arange(context).repeat(rows, 1)
    begins = torch.rand(rows, context, generator=generator) < 1 / mean
    begins[:, 0] = True
    return places.where(begins, 0).cummax(dim=1).values


def milliseconds(rows: int, mean: int, shape: dict[str, Any]) -> dict[str, float]:
    """CPU time of a whole step by each way, the median."""
    settings = {**{f"model.{key}": value for key, value in shape.items()},
                "train.batch_size": rows, "train.micro_batch_size": rows, "train.zero_stage": 0}  # fmt: skip
    config = load_config(DEMO_CONFIG, [f"{key}={value}" for key, value in settings.items()])
    engine = Engine(config, World(), torch.device("cpu"))
    engine.draw(0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape["vocab_size"], (rows, shape["context_length"] + 1), generator=generator)

    def step(documents: bool, one_mask: bool = False) -> None:
        documents_of.SHORT = shape["context_length"] if one_mask else 0
        found = starts(rows, shape["context_length"], mean, generator) if documents else None
        engine.set_learning_rate(1e-3)
        engine.zero_grad()
        loss, entropy = engine.loss(ids[:, :-1], ids[:, 1:], document_starts=found)
        engine.backward(loss)
        engine.reduce_and_clip(1.0, [entropy], stop=False)
        engine.step()

    ways = {
        "without a mask": lambda: step(False),
        "a call for each document": lambda: step(True),
        "one mask": lambda: step(True, one_mask=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + ROUNDS):
        for name, way in ways.items():
            began = time.process_time()  # of one thread: a busy machine changes it little
            way()
            if turn > 0:
                seconds[name].append(time.process_time() - began)
    return {name: round(statistics.median(found) * 1e3, 1) for name, found in seconds.items()}


def main() -> None:
    refuse_arguments(__doc__)
    torch.set_num_threads(1)
    with process_group(World(), torch.device("cpu")):
        figures = {name: milliseconds(rows, mean, shape) for name, (rows, mean, shape) in CASES.items()}
    save(Path(__file__).stem, figures, "milliseconds of CPU time of a whole step, float32, one thread")


if __name__ == "__main__":
    main()
