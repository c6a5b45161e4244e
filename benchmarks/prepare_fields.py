"""Measures what nested fields and a condition cost `pipeline prepare`: whole processes, CPU seconds, interleaved.

    python -m benchmarks.prepare_fields [--text FILE] [--rounds 3]

The same documents as text, and as JSON lines with the text in a field, with the text in a field of a field, and with a
condition that all of them, or half of them, meet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import corpus
from benchmarks.harness import save
from benchmarks.prepare import experiment, prepare
from benchmarks.processes import Usage, measure, medians

CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "jsonl": {"field": "text"},
    "jsonl, field: content.text": {"field": "content.text"},
    "jsonl, where: all": {"field": "text", "where": "language == 'en' and score >= 0.0"},
    "jsonl, where: half": {"field": "text", "where": "language == 'en' and score >= 0.5"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="documents separated by the byte 0x1e")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-fields-") as temp:
        folder = Path(temp)
        text = arguments.text or corpus.build(Path(tempfile.gettempdir()) / "bench-corpus")
        commands = _commands(folder, text)
        runs: dict[str, list[Usage]] = {name: [] for name in CASES}
        for _ in range(arguments.rounds):
            for name, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                runs[name].append(measure(command))
        megabytes = text.stat().st_size / 1e6
        save("prepare_fields", {name: medians(found, megabytes) for name, found in runs.items()}, "MB are of the text")


def _commands(folder: Path, text: Path) -> dict[str, list[str]]:
    tokenizer = train_tokenizer(folder, text)
    flat, nested = folder / "flat.jsonl", folder / "nested.jsonl"
    with flat.open("w") as one, nested.open("w") as other:
        for number, document in enumerate(text.read_text().split(corpus.SEPARATOR)):
            about = {"language": "en", "score": float(number % 2)}
            one.write(json.dumps({"text": document, **about}, ensure_ascii=False) + "\n")
            other.write(json.dumps({"content": {"text": document}, **about}, ensure_ascii=False) + "\n")
    commands = {}
    for number, (name, source) in enumerate(CASES.items()):
        file = text if not source else nested if "." in source["field"] else flat
        config = experiment(folder, f"case_{number}", [file], tokenizer)
        tree = yaml.safe_load(config.read_text())
        tree["data"]["path"] = str(folder / "out")
        if source:
            tree["data"]["sources"][0] = {"name": "english", "paths": [str(file)], **source}
        config.write_text(yaml.safe_dump(tree))
        commands[name] = prepare(config)
    return commands


def train_tokenizer(folder: Path, text: Path) -> Path:
    """Trains a tokenizer on a sample of the text, as `prepare` does."""
    config = experiment(folder, "first", [text], folder / "none.json")
    tree = yaml.safe_load(config.read_text())
    tree["tokenizer"] = {"kind": "bpe", "train_sample_mb": 20}
    config.write_text(yaml.safe_dump(tree))
    measure(prepare(config))
    return folder / "first" / "tokenizer.json"


if __name__ == "__main__":
    main()
