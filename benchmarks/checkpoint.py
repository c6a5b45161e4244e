"""Measures what a checkpoint costs, against peers: stall, time to durable, resume, stop on request, load.

    python -m benchmarks.checkpoint            both sizes
    python -m benchmarks.checkpoint --small    10M parameters only

Every peer saves the same state of the same engine (one process, ZeRO 0: float32 weights and both moments) between real
training steps. The peers take turns, so that drift of the machine affects all alike. Three figures each, medians over
the rounds:

- stall: seconds by which a save stalls the loop: in its call and, for ours, in the wait before the optimizer step;
- step: how much longer the steps until durable took than undisturbed ones, stall included: what the background work
  takes from the two cores that the model computes on;
- durable: seconds from the call until the files are on disk (fsync).

A load is measured on two ranks: the peak growth of a rank's own memory (mapped files excluded), beside its share of
weights and moments and the largest fragment of the files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint_peers import OWN, Bench, Saving
from benchmarks.harness import save
from pipeline.config.load import parse_config
from pipeline.run.world import World
from pipeline.train.ranks.group import process_group
from tests import processes
from tests.train.loading import load_state, save_state

SHAPES = {
    "10M": {"vocab_size": 8192, "d_model": 320, "num_layers": 4, "num_heads": 5, "d_ff": 853},
    "100M": {"vocab_size": 16384, "d_model": 768, "num_layers": 11, "num_heads": 12, "d_ff": 2048},
}
CONTEXT, BATCH = 128, 4
ROUNDS = {"10M": 5, "100M": 2}  # about four minutes on two cores
NOTES = (
    f"saves and restarts: one process, ZeRO 0; loads: two; float32, {BATCH} sequences of {CONTEXT} tokens per step, "
    f"medians; rounds of saves: {ROUNDS}"
)


def experiment(folder: Path, size: str) -> dict[str, Any]:
    """Returns the config of a run of this size on the text of `write_text`."""
    return {
        "name": size,
        "runs_dir": str(folder / "runs"),
        "data": {
            "path": str(folder / "tokens"),
            "sources": [{"name": s, "paths": [str(folder / f"{s}.txt")], "split": s} for s in ("train", "validation")],
        },
        "tokenizer": {"kind": "bytes"},
        "model": {**SHAPES[size], "context_length": CONTEXT},
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_iters": 2, "cosine_cycle_iters": 1000},
        "train": {
            "batch_size": BATCH,
            "micro_batch_size": BATCH,
            "max_iters": 1000,
            "log_interval": 1,
            "val_interval": 1000,
            "num_val_batches": 1,
            "checkpoint_interval": 1000,
            "device": "cpu",
        },
        "tracking": {"uri": "none"},
    }


def write_text(folder: Path) -> None:
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("We hold these truths to be self-evident. " * 4000)


# ---- stall and time to durable ---------------------------------------------------------------


def measure(size: str, folder: Path) -> dict[str, Any]:
    """Returns the figures of all peers at one size."""
    (folder / size).mkdir()
    bench = Bench(parse_config(json.dumps(experiment(folder, size))), folder / size)
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    first: dict[str, float] = {}
    plain: list[float] = []
    for turn in range(1 + ROUNDS[size]):
        for name, peer in bench.peers().items():
            plain.append(bench.step(lambda: None)[0])
            target = bench.folder / f"peer_{turn}"
            figures = one_save(bench, peer, target)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            os.sync()  # so that no peer pays for another's dirty pages
            if turn == 0:
                first[name] = figures["stall"]
            else:
                for key, value in figures.items():
                    found[name][key].append(value)
    undisturbed = statistics.median(plain)
    stalls = {name: statistics.median(f["stall"]) for name, f in found.items()}
    return {
        "parameters": bench.parameters,
        "step_s_undisturbed": round(undisturbed, 3),
        "peers": {
            name: {
                "stall_s": round(statistics.median(f["stall"]), 4),
                "longer_steps_s": round(
                    statistics.median(f["stepping"]) - undisturbed * statistics.median(f["steps"]), 3
                ),
                "durable_s": round(statistics.median(f["durable"]), 3),
                "first_stall_s": round(first[name], 3),
            }
            for name, f in found.items()
        },
        "own_stall_as_part_of": {n: round(stalls[OWN] / s, 4) for n, s in stalls.items() if not n.startswith("own")},
    }


def one_save(bench: Bench, peer: Callable[[Path], Saving], target: Path) -> dict[str, float]:
    """Saves once between steps and keeps stepping until the save is durable; returns its figures."""
    began = time.perf_counter()
    saving = peer(target)
    stall = call = time.perf_counter() - began
    stepping = steps = 0.0
    while True:
        seconds, waited = bench.step(saving.before_step)
        stall, stepping, steps = stall + waited, stepping + seconds, steps + 1
        if saving.durable():
            break
    synchronous = call > 0 and saving.durable is Saving.durable
    ahead = 0.0 if not synchronous else stepping
    saving.finish()
    return {
        "stall": stall,
        "stepping": stepping + call,
        "steps": steps,
        "durable": time.perf_counter() - began - ahead,
    }


# ---- resume and stop on request --------------------------------------------------------------


def measure_restart(size: str, folder: Path) -> dict[str, float]:
    """Returns the seconds from process start to first step, fresh and resumed, and from SIGUSR2 to durable."""
    config = folder / f"{size}.json"
    config.write_text(json.dumps(experiment(folder, size)))
    run = folder / "runs" / size
    fresh, stops, resumed = [], [], []
    for turn in range(3):
        process, seconds = start(config, run)
        (resumed if turn else fresh).append(seconds)
        time.sleep(1)
        began = time.monotonic()
        there = set((run / "checkpoints").glob("step_*"))
        process.send_signal(signal.SIGUSR2)
        while set((run / "checkpoints").glob("step_*")) <= there:
            time.sleep(0.005)
        stops.append(time.monotonic() - began)
        if process.wait(60) != 85:
            raise SystemExit(f"the run of {size} ended with {process.returncode}")
    return {
        "process_start_to_first_step_s": round(fresh[0], 2),
        "process_start_to_first_step_resumed_s": round(statistics.median(resumed), 2),
        "sigusr2_to_durable_s": round(statistics.median(stops), 2),
    }


def start(config: Path, run: Path) -> tuple[subprocess.Popen[bytes], float]:
    metrics = run / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "train", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not metrics.exists() or metrics.stat().st_size <= size:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before its first step")
        time.sleep(0.005)
    return process, time.monotonic() - began


# ---- memory of a load ------------------------------------------------------------------------


def measure_load(size: str, folder: Path) -> dict[str, dict[str, float]]:
    """Returns the peak MB of a load on two ranks, by the ZeRO stages of writer and reader, beside a rank's share."""
    config = folder / f"loads_{size}.json"
    tree = experiment(folder, size)
    config.write_text(
        json.dumps({**tree, "train": {**tree["train"], "micro_batch_size": 1}})
    )  # two ranks share a batch
    found = {}
    for written_at, stage in ((2, 2), (3, 3), (3, 2), (2, 3)):
        saved = folder / f"loads_{size}"
        processes.on_ranks(save_state, 2, folder / "load.log", str(config), str(saved), written_at, timeout_s=300)
        loads = processes.on_ranks(load_state, 2, folder / "load.log", str(config), str(saved), stage, timeout_s=300)
        shutil.rmtree(saved)
        worst = max(loads, key=lambda load: load["grown"] / load["share"])
        found[f"ZeRO-{written_at} to ZeRO-{stage}"] = {f"{k}_mb": round(v / 1e6, 1) for k, v in worst.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    sizes = ["10M"] if parser.parse_args().small else list(SHAPES)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    try:
        write_text(folder)
        config = folder / "data.json"
        config.write_text(json.dumps(experiment(folder, "10M")))
        subprocess.run([sys.executable, "-m", "pipeline", "prepare", str(config)], check=True, capture_output=True)
        parts = {"saves": measure, "restarts": measure_restart, "loads": measure_load}
        figures: dict[str, dict[str, Any]] = {}
        with process_group(World(), torch.device("cpu")):
            for part, measured in parts.items():
                for size in sizes:
                    figures.setdefault(part, {})[size] = measured(size, folder)
                    save("checkpoint", figures, NOTES)  # each time, so that an interrupted run keeps its results
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
