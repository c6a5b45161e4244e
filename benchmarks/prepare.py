"""Text to memory-mapped tokens, training a vocabulary, and reading batches, against the tools people use for each.

    python -m benchmarks.prepare [--text FILE] [--rounds 3]

End to end: `pipeline prepare` (read, encode, index, hash, check, write) as a whole process against processes that
read the same file with Hugging Face `tokenizers` (`encode_batch_fast`) or `tiktoken` and write a memmap, without
index, digests or checks. All use the same vocabulary and must write the same number of tokens. The runs are
interleaved; seconds of wall and CPU are medians, start-up of the interpreter included. Without `--text` the text is
built from Debian packages.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks import corpus
from benchmarks.harness import save

VOCAB_SIZE = 32_000
PEER_BATCH_BYTES = 8 << 20
DEMO_CONTEXT, DEMO_BATCH = 256, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="documents separated by the byte 0x1e")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", nargs=4, metavar=("NAME", "TEXT", "TOKENIZER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        run_peer(*arguments.peer)
        return
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as temp:
        folder = Path(temp)
        text = arguments.text or corpus.build(Path(tempfile.gettempdir()) / "bench-corpus")
        tokenizer, training = compare_training(folder, text)
        figures = {
            "text_mb": round(text.stat().st_size / 1e6, 1),
            "end_to_end": compare_end_to_end(folder, text, tokenizer, arguments.rounds),
            "bpe_training": training,
            "batch_reading": compare_reading(folder / "own", tokenizer),
        }
    save("prepare", figures, notes="text: distinct English documents of Debian's documentation packages, no copies")


def experiment(folder: Path, text: Path, tokenizer: dict[str, Any]) -> Path:
    """A config file that prepares `text` in `folder/own`."""
    tree = {
        "name": "bench",
        "data": {
            "path": str(folder / "own"),
            "sources": [{"name": "english", "paths": [str(text)], "separator": corpus.SEPARATOR}],
            "validation_fraction": 0.01,
        },
        "tokenizer": tokenizer,
        "model": {
            "vocab_size": VOCAB_SIZE, "context_length": DEMO_CONTEXT, "d_model": 64, "num_layers": 1,
            "num_heads": 1, "d_ff": 64,
        },
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_iters": 1, "cosine_cycle_iters": 2},
        "train": {"batch_size": 8, "micro_batch_size": 8, "max_iters": 2},
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def compare_end_to_end(folder: Path, text: Path, tokenizer: Path, rounds: int) -> dict[str, Any]:
    config = experiment(folder, text, {"kind": "file", "path": str(tokenizer)})
    own = [sys.executable, "-m", "pipeline", "prepare", str(config)]
    commands = {"pipeline prepare": own} | {
        name: [
            sys.executable,
            "-m",
            "benchmarks.prepare",
            "--peer",
            name,
            str(text),
            str(tokenizer),
            str(folder / name),
        ]
        for name in ("tokenizers", "tiktoken")
    }
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    text.read_bytes()  # into the page cache, for all alike
    for _ in range(rounds):
        for name, command in commands.items():
            shutil.rmtree(folder / "own", ignore_errors=True)
            times[name].append(measure(command))
    subprocess.run(own, check=True, capture_output=True)
    tokens = sum(f.stat().st_size // 2 for f in (folder / "own").rglob("*.bin"))
    for name in ("tokenizers", "tiktoken"):
        assert (folder / name).stat().st_size // 2 == tokens, f"{name} wrote another number of tokens"
    result: dict[str, Any] = {"tokens": tokens, "rounds": rounds}
    for name, runs in times.items():
        wall, cpu, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        rate = text.stat().st_size / 1e6 / cpu
        result[name] = {
            "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "mb_per_cpu_s": round(rate, 1), "peak_mb": round(peak),
            "cpu_s_of_each_run": [round(run[1], 2) for run in runs],
        }  # fmt: skip
    for name in ("tokenizers", "tiktoken"):
        result[f"times_{name}_by_cpu"] = round(result[name]["cpu_s"] / result["pipeline prepare"]["cpu_s"], 1)
        result[f"times_{name}_by_wall"] = round(result[name]["wall_s"] / result["pipeline prepare"]["wall_s"], 1)
    return result


def measure(command: Sequence[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in MB of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if status != 0:
        raise SystemExit(f"{command} failed with {status}")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def run_peer(name: str, text: str, tokenizer: str, out: str) -> None:
    """What a user of the other tools writes: read, encode in batches on all cores, write a memmap."""
    import json

    import numpy as np

    documents = Path(text).read_bytes().decode().split(corpus.SEPARATOR)[:-1]
    end = json.loads(Path(tokenizer).read_text())["added_tokens"][0]["id"]
    if name == "tokenizers":
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(tokenizer)
        encode: Callable[[list[str]], list[list[int]]] = lambda batch: [e.ids for e in fast.encode_batch_fast(batch)]  # noqa: E731
    else:
        import tiktoken

        encoding = tiktoken.Encoding("own", pat_str=GPT2_PATTERN, mergeable_ranks=ranks(tokenizer), special_tokens={})
        encode = lambda batch: encoding.encode_ordinary_batch(batch, num_threads=os.cpu_count() or 1)  # noqa: E731
    pieces = []
    for batch in batches(documents):
        for ids in encode(batch):
            ids.append(end)
            pieces.append(np.array(ids, np.uint16))
    tokens = np.memmap(out, np.uint16, "w+", shape=(sum(map(len, pieces)),))
    np.concatenate(pieces, out=tokens)
    tokens.flush()


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def batches(documents: list[str]) -> list[list[str]]:
    made: list[list[str]] = [[]]
    size = 0
    for document in documents:
        made[-1].append(document)
        size += len(document)
        if size >= PEER_BATCH_BYTES:
            made.append([])
            size = 0
    return made


def ranks(tokenizer: str) -> dict[bytes, int]:
    """The vocabulary as tiktoken wants it: the ids are the order of the merges already."""
    import json

    from pipeline.data.tokenizer_json import byte_characters

    byte_of = {c: b for b, c in enumerate(byte_characters())}
    vocab = json.loads(Path(tokenizer).read_text())["model"]["vocab"]
    return {bytes(byte_of[c] for c in token): i for token, i in vocab.items()}


def compare_training(folder: Path, text: Path, megabytes: int = 60) -> tuple[Path, dict[str, Any]]:
    """BPE of 32,000 tokens on the same text; returns the tokenizer of this project."""
    from pipeline.data.tokenizer import train_bpe

    content = text.read_bytes()[: megabytes * 10**6]
    content = content[: content.rindex(corpus.SEPARATOR.encode())]
    documents = content.decode().split(corpus.SEPARATOR)
    file = folder / "tokenizer.json"

    def own() -> None:
        file.write_text(train_bpe(content, corpus.SEPARATOR.encode(), VOCAB_SIZE, ["<|endoftext|>"], "gpt2"))

    def hugging_face() -> None:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, initial_alphabet=alphabet, show_progress=False)
        made.train_from_iterator(documents, trainer)

    peers = {"pipeline (gigatoken)": own, "tokenizers": hugging_face}
    try:
        import rustbpe

        pattern = GPT2_PATTERN.replace("++", "+").replace(r"|\s+$", "")
        peers["rustbpe"] = lambda: rustbpe.Tokenizer().train_from_iterator(
            iter(documents), VOCAB_SIZE - 1, pattern=pattern
        )
        missing = None
    except ImportError:
        missing = "rustbpe is not installed and was left out"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    for _ in range(2):
        for name, call in peers.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    result: dict[str, Any] = {"text_mb": megabytes, "vocab_size": VOCAB_SIZE}
    for name, runs in times.items():
        result[name] = {"wall_s": round(min(w for w, _ in runs), 2), "cpu_s": round(min(c for _, c in runs), 2)}
    if missing:
        result["note"] = missing
    return file, result


def compare_reading(dataset: Path, tokenizer: Path) -> dict[str, Any]:
    """Shuffled batches against a copy of as many bytes from one place to another."""
    import numpy as np

    from pipeline.config import DataConfig
    from pipeline.data.dataset import BatchReader, open_dataset

    opened = open_dataset(dataset, "train")
    data = DataConfig.model_validate({"sources": [{"name": "english", "paths": ["-"]}]})
    result: dict[str, Any] = {}
    for context, batch in ((DEMO_CONTEXT, DEMO_BATCH), (1024, 64), (4096, 64)):
        reader = BatchReader(opened, data, seed=1, context_length=context, batch_size=batch)
        steps = max(20, 20_000_000 // (context * batch))
        for index in range(steps):  # the pages of the shards into memory
            reader.batch(index, 0, batch)
        began = time.perf_counter()
        for index in range(steps):
            reader.batch(index, 0, batch)
        own = (time.perf_counter() - began) / steps
        x = np.empty((batch, context), np.int64)
        y = np.empty_like(x)
        source = np.ones_like(x)
        began = time.perf_counter()
        for _ in range(steps):
            x[:] = source
            y[:] = source
        copy = (time.perf_counter() - began) / steps
        result[f"context {context}, batch {batch}"] = {
            "ms_a_batch": round(own * 1e3, 3),
            "gb_per_s_delivered": round(2 * x.nbytes / own / 1e9, 2),
            "memcpy_gb_per_s": round(2 * x.nbytes / copy / 1e9, 2),
            "million_tokens_per_s": round(context * batch / own / 1e6, 1),
        }
    return result


if __name__ == "__main__":
    main()
