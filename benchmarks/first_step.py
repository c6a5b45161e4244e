"""Measures the seconds from the command `pipeline train` to the end of the first step, at the demo's size.

Beside it what no program with PyTorch can do without: Python alone, and `import torch`; and `pipeline --help`.

python -m benchmarks.first_step [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import save
from benchmarks.peer_environment import ROOT
from benchmarks.train_peers import pipeline
from tests.experiment import lines

STEPS = ["train.max_iters=1", "train.log_interval=1", "train.num_val_batches=1", "optimizer.cosine_cycle_iters=null"]


def first_step(tokens: Path) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        settings = [f"data.path={tokens}", "name=run", "runs_dir=runs", "tracking.uri=none", *STEPS]
        pipeline(Path(folder), "train", ROOT / "configs/demo.yaml", *settings)
        logged: float = lines(Path(folder, "runs/run/metrics.jsonl"))[0]["time"]
        return logged - began


def process(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        tokens = Path(name, "tokens")
        pipeline(ROOT, "prepare", ROOT / "configs/demo.yaml", f"data.path={tokens}")
        peers: dict[str, Callable[[], float]] = {
            "python -c pass": lambda: process("-c", "pass"),
            "import torch": lambda: process("-c", "import torch"),
            "pipeline --help": lambda: process("-m", "pipeline", "--help"),
            "pipeline train, first step": lambda: first_step(tokens),
        }
        turns = [{what: measure() for what, measure in peers.items()} for _ in range(rounds + 1)][1:]
        found = {what: [turn[what] for turn in turns] for what in peers}
    figures = {
        what: {"seconds": round(statistics.median(all_of), 3), "spread": [round(min(all_of), 3), round(max(all_of), 3)]}
        for what, all_of in found.items()
    }
    save("first_step", figures, "the demo's config in float32; its files are in the page cache")


if __name__ == "__main__":
    main()
