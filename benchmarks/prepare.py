"""Measures tokenizing, BPE training, memory and batch reading, against the usual tool for each.

    python -m benchmarks.prepare [--text FILE] [--rounds 3]

End to end: `pipeline prepare` (read, encode, index, hash, check, split, write) as a whole process, against processes
that read the same file with Hugging Face `tokenizers` (`encode_batch_fast`), tiktoken, or gigatoken by itself, and
write the tokens, without index, digests, checks or split (prepare_peers.py). All use the same vocabulary and must
write the same number of tokens. The runs are interleaved, with one of `pipeline prepare` before each run of a peer.
Wall and CPU seconds are medians, start-up of the interpreter included. Without `--text`, the text is built from Debian
packages. rustbpe is compared if it is installed (`pip install rustbpe==0.1.0`).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import corpus
from benchmarks.harness import save
from benchmarks.prepare_peers import VOCAB_SIZE
from benchmarks.processes import Usage, measure, medians

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
PEERS = [sys.executable, "-m", "benchmarks.prepare_peers"]
PEER_ENCODERS = ("tiktoken", "tokenizers", "gigatoken")
TRAINING_MB = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="documents separated by the byte 0x1e")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as temp:
        folder = Path(temp)
        text = arguments.text or corpus.build(Path(tempfile.gettempdir()) / "bench-corpus")
        tokenizer = folder / "tokenizer.json"
        figures = {
            "text_mb": round(text.stat().st_size / 1e6, 1),
            "bpe_training": compare_training(text, tokenizer),
            "end_to_end": compare_end_to_end(folder, text, tokenizer, arguments.rounds),
            "batch_reading": compare_reading(folder / "own"),
            "memory": compare_memory(folder, text, tokenizer),
        }
    save(
        "prepare",
        figures,
        notes="text: distinct English documents of Debian's documentation packages, no copies. memory: the 2 GB of "
        "English are hard links to one text; nearly all words of the random text differ, the worst case for an encoder "
        "that caches words",
    )


def experiment(folder: Path, name: str, texts: list[Path], tokenizer: Path) -> Path:
    """Writes a config file that prepares `texts` in `folder/name`; returns its path."""
    tree = {
        "name": "bench",
        "data": {
            "path": str(folder / name),
            "sources": [{"name": "english", "paths": [*map(str, texts)], "separator": corpus.SEPARATOR}],
            "validation_fraction": 0.01,
        },
        "tokenizer": {"kind": "file", "path": str(tokenizer)},
        "model": {
            "vocab_size": VOCAB_SIZE, "context_length": 128, "d_model": 64, "num_layers": 1, "num_heads": 1, "d_ff": 64,
        },
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_iters": 1, "cosine_cycle_iters": 2},
        "train": {"batch_size": 8, "micro_batch_size": 8, "max_iters": 2},
    }  # fmt: skip
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def prepare(config: Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", "prepare", str(config)]


def compare_training(text: Path, tokenizer: Path) -> dict[str, Any]:
    """Trains a BPE of 32,000 tokens on the same text, twice per tool; leaves this project's in `tokenizer`."""
    names = ["pipeline", "tokenizers", *(["rustbpe"] if importlib.util.find_spec("rustbpe") else [])]
    runs: dict[str, list[Usage]] = defaultdict(list)
    for _ in range(2):
        for name in names:
            runs[name].append(measure([*PEERS, "train", name, str(text), str(TRAINING_MB), str(tokenizer)]))
    return {"text_mb": TRAINING_MB, "vocab_size": VOCAB_SIZE, **{n: medians(r, TRAINING_MB) for n, r in runs.items()}}


def compare_end_to_end(folder: Path, text: Path, tokenizer: Path, rounds: int) -> dict[str, Any]:
    """Compares whole processes from text to tokens; our dataset stays in `folder/own`."""
    own, megabytes = prepare(experiment(folder, "own", [text], tokenizer)), text.stat().st_size / 1e6
    peers = {n: [*PEERS, "encode", n, str(text), str(tokenizer), str(folder / n)] for n in PEER_ENCODERS}
    runs: dict[str, list[Usage]] = defaultdict(list)
    for _ in range(rounds):
        for name, command in peers.items():
            for label, wanted in (("pipeline prepare", own), (name, command)):
                shutil.rmtree(folder / "own", ignore_errors=True)
                runs[label].append(measure(wanted))
                print(f"{label}: {runs[label][-1]}", file=sys.stderr)
    shutil.rmtree(folder / "own", ignore_errors=True)
    runs["pipeline prepare"].append(measure(own))
    tokens = sum(file.stat().st_size // 2 for file in (folder / "own").rglob("*.bin"))
    for name in peers:
        if (folder / name).stat().st_size // 2 != tokens:
            raise SystemExit(f"{name} wrote a different number of tokens")
    result: dict[str, Any] = {"tokens": tokens, **{name: medians(r, megabytes) for name, r in runs.items()}}
    for name in peers:
        for unit in ("cpu", "wall"):
            ratio = result[name][f"{unit}_s"] / result["pipeline prepare"][f"{unit}_s"]
            result[f"times_{name}_by_{unit}"] = round(ratio, 1)
    return result


def compare_memory(folder: Path, text: Path, tokenizer: Path) -> dict[str, Any]:
    """Measures peak memory on 100 MB and on 2 GB of the same kind of text."""
    result: dict[str, Any] = {}
    for kind, made in (("English", english_of(folder, text)), ("random words", random_words_of(folder))):
        for name, texts in made.items():
            config = experiment(folder, f"memory-{kind[:3]}-{len(texts)}", texts, tokenizer)
            used = measure(prepare(config))
            megabytes = sum(file.stat().st_size for file in texts) / 1e6
            result[f"{kind}, {name}"] = {
                "text_mb": round(megabytes), "peak_mb": round(used.peak_mb), "wall_s": round(used.wall, 1),
                "cpu_s": round(used.cpu, 1), "mb_per_cpu_s": round(megabytes / used.cpu, 1),
            }  # fmt: skip
            print(f"memory: {kind}, {name}: {used}", file=sys.stderr)
    return result


def english_of(folder: Path, text: Path) -> dict[str, list[Path]]:
    small = folder / "english-small.txt"
    with text.open("rb") as source:
        small.write_bytes(source.read(100 * 10**6))
    links = [folder / f"english-{i}.txt" for i in range(-(-2 * 10**9 // text.stat().st_size))]
    copy = Path(shutil.copy(text, folder / "english.txt"))
    for link in links:
        link.hardlink_to(copy)
    return {"100 MB": [small], "2 GB": links}


def random_words_of(folder: Path) -> dict[str, list[Path]]:
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcd        ", np.uint8)
    rng = np.random.default_rng(0)
    made = {"100 MB": 1, "2 GB": 20}
    texts = {name: [folder / f"random-{count}-{i}.txt" for i in range(count)] for name, count in made.items()}
    for files in texts.values():
        for file in files:
            words = letters[rng.integers(0, len(letters), 100_000_000, np.uint8)]
            words[rng.integers(0, len(words), 30_000)] = ord(corpus.SEPARATOR)
            words.tofile(file)
    return texts


def compare_reading(dataset: Path) -> dict[str, Any]:
    """Compares shuffled batches with a copy of the same bytes and with a demo step, in CPU time of one thread."""
    from pipeline.config.data_sections import DataConfig
    from pipeline.config.load import load_config
    from pipeline.data.dataset import open_dataset
    from pipeline.data.order.batches import BatchReader

    demo = load_config(DEMO, ())
    opened = open_dataset(dataset, "train")
    data = DataConfig.model_validate({"sources": [{"name": "english", "paths": ["-"]}]})
    result: dict[str, Any] = {}
    for context, batch in ((demo.model.context_length, demo.train.batch_size), (1024, 64), (4096, 64)):
        reader = BatchReader(opened, data, seed=1, context_length=context, batch_size=batch)
        source = np.ones((batch, context), np.int64)
        steps = max(50, 20_000_000 // source.size)
        for index in range(steps):  # brings the pages of the shards into memory
            reader.batch(index, 0, batch)
        own = _median_seconds(lambda index, r=reader, b=batch: r.batch(index, 0, b), steps)
        copy = _median_seconds(lambda _, s=source: (s.copy(), s.copy()), steps)
        result[f"context {context}, batch {batch}"] = {
            "cpu_ms_a_batch": round(own * 1e3, 3),
            "gb_per_cpu_s_delivered": round(2 * source.nbytes / own / 1e9, 2),
            "memcpy_gb_per_cpu_s": round(2 * source.nbytes / copy / 1e9, 2),
            "million_tokens_per_cpu_s": round(source.size / own / 1e6, 1),
        }
    step = _step_seconds(demo)
    shape = f"context {demo.model.context_length}, batch {demo.train.batch_size}"
    result["a step of the demo's model"] = {
        "forward_and_backward_cpu_ms": round(step * 1e3, 1),
        "of_which_its_batch_would_be": f"{result[shape]['cpu_ms_a_batch'] / 1e3 / step:.3%}",
    }
    return result


def _step_seconds(demo: Any) -> float:
    """Measures forward and backward of one global batch; clipping and AdamW would add to it."""
    import torch

    from pipeline.model.loss import cross_entropy
    from pipeline.model.transformer import TransformerLM

    torch.set_num_threads(1)
    model = TransformerLM(**demo.model.model_dump())
    x = torch.randint(demo.model.vocab_size, (demo.train.batch_size, demo.model.context_length))
    return _median_seconds(lambda _: cross_entropy(model(x), x).backward(), 20)


def _median_seconds(call: Callable[[int], object], times: int) -> float:
    seconds = []
    for index in range(times):
        began = time.thread_time()
        call(index)
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
