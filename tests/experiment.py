"""A tiny experiment for real ranks: its text and config, and readers of the run folder."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import yaml

from pipeline.files import write_text

STEPS = 100
CHECKPOINT_INTERVAL = 5
BATCH_SIZE = 8


def write_experiment(folder: Path, runs_dir: Path, name: str, **changes: Any) -> Path:
    """Writes text and a config below `folder`, for a run in `runs_dir`; returns the config's path.

    Args:
        folder: Shared by experiments on the same data.
        runs_dir: Where the run goes.
        name: Name of the run.
        changes: Values by their dotted keys.
    """
    text = folder / "text"
    if not text.exists():
        text.mkdir(parents=True)
        rng = random.Random(0)
        words = ["the", "union", "of", "states", "war", "peace", "law", "and", "people", "congress"]
        for split, count in (("train", 6000), ("validation", 400)):
            (text / f"{split}.txt").write_text(" ".join(rng.choice(words) for _ in range(count)))
    tree: dict[str, Any] = {
        "name": name,
        "runs_dir": str(runs_dir),
        "data": {
            "path": str(folder / "tokens"),
            "sources": [
                {"name": split, "paths": [str(text / f"{split}.txt")], "split": split}
                for split in ("train", "validation")
            ],
        },
        "tokenizer": {"kind": "bytes"},
        "model": {
            "vocab_size": 257, "context_length": 16, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64,
        },
        "optimizer": {
            "learning_rate": 3e-3, "min_learning_rate": 3e-4, "warmup_iters": 5, "cosine_cycle_iters": STEPS,
        },
        "train": {
            "batch_size": BATCH_SIZE, "micro_batch_size": 2, "max_iters": STEPS, "device": "cpu", "log_interval": 1,
            "val_interval": 25, "num_val_batches": 2, "checkpoint_interval": CHECKPOINT_INTERVAL,
        },
        "tracking": {"uri": "none"},
    }  # fmt: skip
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    path = folder / f"{name}.yaml"
    write_text(path, yaml.safe_dump(tree))  # at once: another worker may be reading the file of this name
    return path


def demo_text(folder: Path) -> list[str]:
    """Returns overrides that make the demo read its text from this folder, the training part as one source."""
    parts = {"speeches": "train", "last-speeches": "validation"}
    sources = [{"name": name, "paths": [f"{folder}/{split}/*.txt"], "split": split} for name, split in parts.items()]
    return [f"data.sources={json.dumps(sources)}", "data.mixing=proportional"]


def in_precision(precision: str, world: int, stage: int) -> dict[str, Any]:
    """Returns the settings of a precision at this layout; at stage 1, bf16 does not go with accumulation."""
    alone = {"train.micro_batch_size": BATCH_SIZE // world} if (precision, stage) == ("bf16", 1) else {}
    return {"train.precision": precision, **alone}


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a JSON-lines file, without one that is being written and those that are torn."""
    found = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        with contextlib.suppress(ValueError):
            found += [json.loads(line)] if line.endswith("\n") else []
    return found


def last_step(run: Path) -> int:
    """Returns the last step in the metrics."""
    return max((line["step"] for line in lines(run / "metrics.jsonl")), default=0)


def curve(run: Path) -> list[tuple[int, float]]:
    """Returns every training loss in the metrics, in the order of the file: a repeated step shows twice."""
    return [(line["step"], line["train/loss"]) for line in lines(run / "metrics.jsonl") if "train/loss" in line]


def validations(run: Path) -> list[tuple[int, float]]:
    """Returns every validation loss in the metrics."""
    return [(line["step"], line["val/loss"]) for line in lines(run / "metrics.jsonl") if "val/loss" in line]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Returns the events of one kind."""
    return [e for e in lines(run / "events.jsonl") if e["event"] == kind]
