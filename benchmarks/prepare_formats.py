"""Measures `pipeline prepare` by the format of the text, beside datatrove's tokenization: whole processes, interleaved.

The same documents as text, JSON lines, compressed by gzip and zstd, and Parquet. datatrove reads the plain JSON lines,
one task per core, with the same tokenizer, and writes tokens and an index without shuffling; it must write the same
number of tokens. It lives in an environment of its own, build/datatrove, which the first run makes.

python -m benchmarks.prepare_formats [--text FILE] [--megabytes 200] [--rounds 3]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard

from benchmarks import corpus
from benchmarks.harness import save
from benchmarks.peer_environment import ROOT, peer_environment
from benchmarks.prepare import experiment, prepare
from benchmarks.prepare_fields import train_tokenizer
from benchmarks.processes import Usage, measure, medians

DATATROVE = "datatrove[io,processing]==0.9.0"
PEER = "jsonl, datatrove"


def write_formats(folder: Path, documents: list[str]) -> dict[str, Path]:
    """Returns a file of these documents in each format."""
    plain = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents).encode()
    files = {name: folder / f"text.{name}" for name in ("txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet")}
    files["txt"].write_text("".join(document + corpus.SEPARATOR for document in documents))
    # datatrove gives each task whole files.
    halves = plain.index(b"\n", len(plain) // 2) + 1
    (folder / "halves").mkdir()
    for number, half in enumerate((plain[:halves], plain[halves:])):
        (folder / "halves" / f"{number}.jsonl").write_bytes(half)
    files["jsonl"].write_bytes(plain)
    files["jsonl.gz"].write_bytes(gzip.compress(plain, 6))
    files["jsonl.zst"].write_bytes(zstandard.compress(plain, 3))
    pq.write_table(pa.table({"text": documents}), files["parquet"], compression="zstd", row_group_size=1000)
    return files


def ours(folder: Path, file: Path, tokenizer: Path) -> list[str]:
    """Returns the command that prepares a file; its tokens go to `folder/out`."""
    config = experiment(folder, f"of_{file.name}", [file], tokenizer)
    tree = yaml.safe_load(config.read_text())
    tree["data"]["path"] = str(folder / "out")
    if file.suffix != ".txt":
        tree["data"]["sources"] = [{"name": "english", "paths": [str(file)], "field": "text"}]
    config.write_text(yaml.safe_dump(tree))
    return prepare(config)


def token_count(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size // 2 for file in folder.rglob(pattern))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="documents separated by the byte 0x1e")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    python = peer_environment("datatrove", [DATATROVE, f"tokenizers=={version('tokenizers')}"])
    text = asked.text or corpus.build(Path(tempfile.gettempdir()) / "bench-corpus")
    with text.open() as source:
        documents = source.read(asked.megabytes * 10**6).split(corpus.SEPARATOR)[:-1]
    with tempfile.TemporaryDirectory(prefix="bench-formats-") as name:
        folder = Path(name)
        files = write_formats(folder, documents)
        tokenizer = train_tokenizer(folder, files["txt"])
        commands = {form: ours(folder, file, tokenizer) for form, file in files.items()}
        worker = [str(python), str(ROOT / "benchmarks/datatrove_peer.py"), str(folder), str(tokenizer)]
        commands[PEER] = [*worker, str(os.cpu_count())]
        runs: dict[str, list[Usage]] = {form: [] for form in commands}
        counts: dict[str, int] = {}
        for _ in range(asked.rounds):
            for form, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                runs[form].append(measure(command))
                counts[form] = token_count(folder / "out", "*.ds" if form == PEER else "*.bin")
                print(form, runs[form][-1], flush=True)
    if len(set(counts.values())) != 1:
        raise SystemExit(f"they wrote different numbers of tokens: {counts}")
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    figures: dict[str, Any] = {form: medians(found, megabytes) for form, found in runs.items()}
    figures["times_datatrove_by_cpu"] = round(figures[PEER]["cpu_s"] / figures["jsonl"]["cpu_s"], 1)
    save("prepare_formats", figures, f"{megabytes:.0f} MB of distinct English documents; MB are of the text")


if __name__ == "__main__":
    main()
