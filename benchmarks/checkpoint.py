"""What a checkpoint costs: the loop's stall and the time to durable, against peers; resume; stop on request.

    python -m benchmarks.checkpoint            both sizes
    python -m benchmarks.checkpoint --small    10M parameters only

Every peer saves the same state of the same engine (one process, ZeRO 0: float32 weights and both moments) between real
training steps, in turn, so that a drift of the machine meets all alike. Three figures each, medians over the rounds:

- stall: seconds the loop stands still for the save: in its call, and for ours in the wait before the optimiser step;
- step: how much longer the steps until durable took than undisturbed ones, the stall included: what the background
  work takes from the two cores the model computes on;
- durable: from the call until the files are on disk (fsync), seconds.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import save

SHAPES = {
    "10M": {"vocab_size": 8192, "d_model": 320, "num_layers": 4, "num_heads": 5, "d_ff": 853},
    "100M": {"vocab_size": 16384, "d_model": 768, "num_layers": 11, "num_heads": 12, "d_ff": 2048},
}
CONTEXT, BATCH = 128, 4
ROUNDS = {"10M": 5, "100M": 2}  # what two cores do in four minutes
OWN = "own, asynchronous"


def experiment(folder: Path, size: str) -> dict[str, Any]:
    """The config of a run of this size on text that `text` made."""
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


@dataclass
class Saving:
    """One save under way.

    Attributes:
        before_step: Waits for what must be done before weights change.
        durable: Whether the files are on disk.
        finish: Waits for that.
    """

    before_step: Callable[[], object] = lambda: None
    durable: Callable[[], bool] = lambda: True
    finish: Callable[[], object] = lambda: None


class Bench:
    """An engine that trains, and the peers that save it."""

    def __init__(self, size: str, folder: Path) -> None:
        import torch

        from pipeline.checkpoint.draft import Writer, begin_attempt
        from pipeline.checkpoint.write import CheckpointSaver
        from pipeline.config_load import parse_config
        from pipeline.model.transformer import TransformerLM
        from pipeline.train.engine import Engine
        from pipeline.train.world import World

        self.config = parse_config(json.dumps(experiment(folder, size)))
        self.folder = folder / size
        self.folder.mkdir()
        torch.manual_seed(0)
        self.model = TransformerLM(**self.config.model.model_dump())
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.engine = Engine(self.model, self.config, World(), torch.device("cpu"))
        self.tokens = torch.randint(0, self.config.model.vocab_size, (BATCH, CONTEXT + 1))
        begin_attempt(self.folder, "bench")
        writer = Writer(0, 1, 0, "bench", torch.distributed.HashStore())
        self.saver = CheckpointSaver(self.folder, writer, self.config.checkpoint, lambda saved: None)
        self.saves = 0

    def step(self, before_step: Callable[[], object]) -> tuple[float, float]:
        """One training step; its seconds and those it waited for `before_step`."""
        from pipeline.model.loss import cross_entropy

        began = time.perf_counter()
        self.engine.zero_grad()
        logits = self.engine(self.tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        self.engine.backward(loss)
        self.engine.clip(1.0, [loss.detach()], False)
        waited = time.perf_counter()
        before_step()
        waited = time.perf_counter() - waited
        self.engine.step()
        return time.perf_counter() - began, waited

    def state(self) -> dict[str, Any]:
        """Weights and moments by name, without a copy."""
        return {f"{key}/{f.name}": t for f in self.engine.fragments() for key, t in f.tensors.items()}

    def peers(self) -> dict[str, Callable[[Path], Saving]]:
        """Every way to save, by name."""
        return {
            OWN: self.own,
            "own, waited for": self.own_synchronous,
            "torch.save": self.torch_save,
            "torch.distributed.checkpoint.save": self.dcp,
            "torch.distributed.checkpoint.async_save": self.dcp_async,
            "DeepSpeed engine.save_checkpoint": self.deepspeed,
        }

    def own(self, path: Path) -> Saving:
        """Ours; goes on in the background."""
        self.saves += 1
        self.saver.save(self.saves, self.engine.fragments(), {"optimizer_steps": self.saves})
        return Saving(self.saver.wait_for_copy, lambda: not self.saver.busy, self.saver.wait)

    def own_synchronous(self, path: Path) -> Saving:
        """Ours, with the loop waiting for it."""
        self.own(path).finish()
        return Saving()

    def torch_save(self, path: Path) -> Saving:
        """One pickle."""
        import torch

        torch.save(self.state(), path)
        return Saving(finish=lambda: fsync_tree(path))

    def dcp(self, path: Path) -> Saving:
        """PyTorch's sharded format."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state(), checkpoint_id=path)
        return Saving(finish=lambda: fsync_tree(path))

    def dcp_async(self, path: Path) -> Saving:
        """The same, staged in host memory first."""
        import torch.distributed.checkpoint as dcp

        future = dcp.async_save(self.state(), checkpoint_id=path)
        return Saving(durable=future.done, finish=lambda: (future.result(), fsync_tree(path)))

    def deepspeed(self, path: Path) -> Saving:
        """DeepSpeed's own."""
        self.engine._engine.save_checkpoint(str(path), tag="x")
        return Saving(finish=lambda: fsync_tree(path))


def fsync_tree(path: Path) -> None:
    """What the peers leave to the kernel: ours has done it when it says durable."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def measure(size: str, folder: Path) -> dict[str, Any]:
    """The figures of all peers at one size."""
    bench = Bench(size, folder)
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
            os.sync()  # one peer's dirty pages are not the next one's burden
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
    """A save between steps; steps go on until it is durable."""
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
    """Seconds from the start of a process to its first step, fresh and resumed, and from SIGUSR2 to durable."""
    config = folder / f"{size}.json"
    config.write_text(json.dumps(experiment(folder, size)))
    run = folder / "runs" / size
    fresh, stops, resumed = [], [], []
    for turn in range(3):
        process, seconds = start(config, run, turn * 1000)
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


def start(config: Path, run: Path, turn: int) -> tuple[subprocess.Popen[bytes], float]:
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


def shown(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, printed as they come: a run that is cut short has not been for nothing."""
    print(json.dumps(figures), flush=True)
    return figures


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
        import torch

        from pipeline.train.ranks import process_group
        from pipeline.train.world import World

        with process_group(World(), torch.device("cpu")):
            saves = {size: shown(measure(size, folder)) for size in sizes}
        restarts = {size: shown(measure_restart(size, folder)) for size in sizes}
    finally:
        shutil.rmtree(folder)
    notes = (
        f"one process, ZeRO 0, float32, {BATCH} sequences of {CONTEXT} tokens a step, medians; saves of each: {ROUNDS}"
    )
    save("checkpoint", {"saves": saves, "restarts": restarts}, notes)


if __name__ == "__main__":
    main()
