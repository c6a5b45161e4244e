"""Compares the speed of training with that of other libraries: same weights, same batches, same optimizer.

Ours is the whole command `pipeline train` with its loop and log. Each measurement is a process of its own; rounds are
interleaved, and the median over all steps after the first few counts. All but the one of another architecture must end
at the same loss. The peers live in an environment of their own, build/peers, which the first run installs.

python -m benchmarks.train_peers [--rounds 3] [--sizes small,large] [--modes fp32,fp32+compile]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import save
from benchmarks.peer_environment import ROOT, peer_environment
from benchmarks.train_peer import PEERS
from pipeline.config.load import load_config
from pipeline.data.dataset import open_dataset
from pipeline.data.order.batches import BatchReader
from tests.experiment import curve, demo_text, lines

OURS = "pipeline train"
LITGPT = "litgpt==0.5.13"
CONTEXT = {"small": 128, "large": 256}
BATCH = {"small": 16, "large": 8}
SHAPES = {
    "small": {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4,
              "num_attention_heads": 4},
    "large": {"vocab_size": 8192, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6,
              "num_attention_heads": 6},
}  # fmt: skip
"""The demo's size, 1.8 million parameters, and 10.7 million."""
STEPS = {"small": 60, "large": 40}  # our helper process shares the cores for a few, ten seconds after the start
RATE, WARM_UP, SKIPPED = 1e-3, 10, 10
MODES = ("fp32", "fp32+compile", "bf16", "bf16+compile")
TOLERANCE = {"fp32": 2e-3, "bf16": 2e-2}
"""Largest relative difference of the last losses from ours."""


def has_bfloat16() -> bool:
    """Returns whether the processor multiplies in bfloat16; where it does not, the figures would say nothing."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def install_peers() -> Path:
    """Returns the Python of the peers' environment, which it makes on the first call."""
    same = [f"{name}=={version(name)}" for name in ("torch", "transformers", "accelerate", "numpy", "safetensors")]
    same[0] = same[0].partition("+")[0]
    # Two calls of pip: litgpt's limits on versions clash with the others.
    return peer_environment("peers", [*same, "lightning", "jsonargparse"], ["--no-deps", LITGPT])


def write_recipe(folder: Path, size: str) -> Path:
    """Writes weights, batches and our config; returns the config."""
    import transformers

    shape = {**SHAPES[size], "max_position_embeddings": CONTEXT[size], "rms_norm_eps": 1e-5}
    first = [*_data(folder / "first"), f"model.vocab_size={shape['vocab_size']}"]  # trains the tokenizer
    pipeline(folder, "prepare", ROOT / "configs/demo.yaml", *first)
    end_of_text = open_dataset(folder / "first", "train").manifest.end_of_text_id
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**shape, tie_word_embeddings=False, eos_token_id=end_of_text)
    model = transformers.LlamaForCausalLM(settings)
    model.save_pretrained(folder / "weights")
    (folder / "weights/tokenizer.json").write_bytes((folder / "first/tokenizer.json").read_bytes())
    pipeline(folder, "new", "ours.yaml", "--from", "hf:weights")
    pipeline(folder, "prepare", "ours.yaml", *_data(folder / "tokens"))
    steps = STEPS[size]
    (folder / "recipe.json").write_text(json.dumps({"shape": shape, "learning_rate": RATE, "warmup": WARM_UP}))
    config = load_config(folder / "ours.yaml", [*_data(folder / "tokens"), *_training(size)])
    reader = BatchReader(
        open_dataset(folder / "tokens", "train"), config.data, seed=config.train.seed,
        context_length=CONTEXT[size], batch_size=BATCH[size],
    )  # fmt: skip
    rows = [torch.cat((x, y[:, -1:]), 1) for x, y in (reader.batch(i, 0, BATCH[size]) for i in range(steps))]
    np.save(folder / "batches.npy", torch.stack(rows).numpy())
    return folder / "ours.yaml"


def _data(dataset: Path) -> list[str]:
    return [f"data.path={dataset}", *demo_text(ROOT / "data/demo/text")]


def _training(size: str) -> list[str]:
    settings: dict[str, Any] = {
        "tracking.uri": "none", "model.context_length": CONTEXT[size], "train.batch_size": BATCH[size],
        "train.micro_batch_size": BATCH[size], "train.max_iters": STEPS[size], "train.log_interval": 1,
        "train.val_interval": 10**6, "train.num_val_batches": 1, "train.checkpoint_interval": 10**6,
        "optimizer.schedule": "constant", "optimizer.learning_rate": RATE, "optimizer.min_learning_rate": RATE,
        "optimizer.warmup_iters": WARM_UP, "optimizer.cosine_cycle_iters": "null", "train.device": "cpu",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items()]


def pipeline(folder: Path, *arguments: object) -> int:
    """Runs a command in the folder; returns its peak memory in MiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return usage.ru_maxrss // 1024


def train_ours(folder: Path, size: str, mode: str) -> dict[str, Any]:
    """Trains by our command; returns what a peer writes."""
    name = f"try{time.monotonic_ns()}"
    precision, _, compiled = mode.partition("+")
    settings = [f"train.precision={precision}", f"train.compile={bool(compiled)}", f"name={name}", "runs_dir=runs"]
    peak = pipeline(folder, "train", "ours.yaml", *_data(folder / "tokens"), *_training(size), *settings)
    run = folder / "runs" / name
    seconds = [line["time/step_s"] for line in lines(run / "metrics.jsonl") if "time/step_s" in line]
    return {"losses": [loss for _, loss in curve(run)], "seconds": seconds, "peak_mib": peak}


def train_peer(python: Path, folder: Path, peer: str, mode: str) -> dict[str, Any]:
    """Trains by a peer in its environment."""
    precision, _, compiled = mode.partition("+")
    out = folder / "out.json"
    worker = [python, ROOT / "benchmarks/train_peer.py", peer, folder, precision, compiled or "eager", out]
    subprocess.run([*map(str, worker)], check=True, stdout=subprocess.DEVNULL, cwd=folder)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def compare(python: Path, size: str, modes: Sequence[str], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each mode and its figures by peer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_recipe(folder, size)
        for mode in modes:
            found: dict[str, list[dict[str, Any]]] = {peer: [] for peer in (OURS, *PEERS)}
            for _ in range(rounds):
                for peer, results in found.items():
                    ours = peer == OURS
                    results.append(train_ours(folder, size, mode) if ours else train_peer(python, folder, peer, mode))
                    last = results[-1]
                    print(f"{size} {mode} {peer}: {_rate(size, [last]):.0f} tokens/s, loss {last['losses'][-1]:.4f}")
            yield mode, _figures(size, mode, found)


def _rate(size: str, results: Sequence[dict[str, Any]]) -> float:
    steps = [s for result in results for s in result["seconds"][SKIPPED:]]
    return BATCH[size] * CONTEXT[size] / statistics.median(steps)


def _figures(size: str, mode: str, found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    loss = found[OURS][0]["losses"][-1]
    limit = TOLERANCE[mode.partition("+")[0]]
    for peer, results in found.items():
        if peer != "nanoGPT's shape" and abs(results[0]["losses"][-1] / loss - 1) > limit:
            raise SystemExit(f"{size} {mode}: {peer} ends at {results[0]['losses'][-1]}, ours at {loss}")
    ours = _rate(size, found[OURS])
    figures: dict[str, Any] = {}
    for peer, results in found.items():
        by_round = sorted(_rate(size, [result]) for result in results)
        figures[peer] = {
            "tokens_per_s": round(_rate(size, results)),
            "spread": [round(by_round[0]), round(by_round[-1])],
            "ours_is_so_many_times_faster": round(ours / _rate(size, results), 3),
            "last_loss": round(results[0]["losses"][-1], 4),
            "peak_mib": max(result["peak_mib"] for result in results),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default=",".join(SHAPES))
    parser.add_argument("--modes", default=",".join(MODES))
    asked = parser.parse_args()
    modes = [mode for mode in asked.modes.split(",") if has_bfloat16() or not mode.startswith("bf16")]
    python = install_peers()
    figures = {size: dict(compare(python, size, modes, asked.rounds)) for size in asked.sizes.split(",")}
    left_out = "" if has_bfloat16() else "; this processor has no products in bfloat16, so bf16 is left out"
    save("train_peers", figures, f"the last losses within {TOLERANCE}, relatively{left_out}")


if __name__ == "__main__":
    main()
