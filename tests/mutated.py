"""What the mutations start from, made by the project's own commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.adopt.find import FormatName

TOKEN_FILES: list[tuple[FormatName, str, str | None]] = [
    ("megatron", "a.bin", None), ("raw", "a.bin", "uint16"), ("olmo", "a.npy", "uint16"), ("npy", "a.npy", None),
]  # fmt: skip
"""Each format, the file that is adopted of its folder, and the type that a user would give."""


def make(folder: Path) -> None:
    """Makes what is mutated: a dataset, token files of others, a run with a checkpoint, two tokenizers."""
    from pipeline.checkpoint.pending import take_over
    from pipeline.data.build.build import prepare
    from pipeline.run.folder import Run, create_run
    from tests.checkpoint.support import save
    from tests.data.helpers import config as data_config
    from tests.data.helpers import documents, jsonl, trained, write

    write(folder / "a.jsonl", jsonl(documents(60, seed=1)))
    source = {"name": "a", "paths": [str(folder / "a.jsonl")]}
    made = data_config(folder / "dataset", [source], slice_size_mb=0.004, validation_fraction=0.2)
    prepare(made)
    created = create_run(made.model_copy(update={"runs_dir": str(folder), "name": "run"}))
    assert isinstance(created, Run)
    take_over(created.checkpoints, "a1")
    for step in (1, 2):
        save(created.checkpoints, step, val_loss=1.0)
    moment = 1.7e9
    metrics = [
        {"step": step, "time": moment + step, "train/loss": 3.0, "time/step_s": 0.1, "time/data_s": 0.01,
         "train/lr": 0.1, "train/tokens_per_s": 9.0, "val/loss": 3.0, "train/tokens_seen": 9}
        for step in (1, 2, 3)
    ]  # fmt: skip
    events = [
        {"time": moment, "event": "submitted", "jobs": ["12"], "site": "here"},
        {"time": moment + 1, "event": "attempt", "number": 1, "step": 0, "reached": 0, "began": moment, "host": "h"},
        {"time": moment + 2, "event": "started", "step": 0, "world_size": 1},
        {"time": moment + 3, "event": "checkpointed", "step": 2, "path": "p", "digest": "ab", "stall_s": 0.1},
        {"time": moment + 4, "event": "spike", "step": 2, "loss": "9", "norm": "1", "batch": 2, "path": "p"},
        {"time": moment + 5, "event": "rollback", "step": 2, "to": 1, "skipped": [1]},
        {"time": moment + 6, "event": "repeating", "step": 1, "reached": 2},
        {"time": moment + 7, "event": "failed", "step": 2, "error": "e"},
    ]
    job = {"id": "12", "stage": "train", "tasks": 1, "submitted": moment, "site": "here", "accounting": False,
           "shared": False, "name": "run-train"}  # fmt: skip
    image = {"path": "i", "sha256": "ab", "code": "image"}
    start = {"time": "t", "git": {"commit": "c", "dirty": False}, "image": image, "host": "h", "packages": {"a": "1"}}
    state = {"identity": "i", "attempt": 1, "status": "FAILED", "ended": moment, "store": "sqlite:////nowhere/m.db",
             "stores": {"sqlite:////nowhere/m.db": {"run_id": "r", "sent": 5, "system": {"h": 3}}}}  # fmt: skip
    files: dict[str, Any] = {
        "provenance.json": {"starts": [start]},
        "evaluation.json": {"step": 2, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.5, "tokens": 100},
        "launch/jobs.json": {"jobs": [job]},
        "mlflow.json": state,
    }
    for name, tree in files.items():
        write(created.path / name, json.dumps(tree).encode())
    about = {"stage": "train", "job": "12", "attempt": 0}
    attempts = [
        {"time": moment, "event": "began", **about, "nodes": "n[1-2]", "gpus": 8, "cpus": 64},
        {"time": moment + 9, "event": "ended", **about, "outcome": "failed", "reason": "r", "code": 1},
        {"time": moment + 9, "event": "charged", "job": "12", "began": moment, "seconds": 9.0, "gpus": 8, "cpus": 64,
         "energy_j": 5.0},
    ]  # fmt: skip
    for name, lines in {
        "metrics.jsonl": metrics, "events.jsonl": events, "launch/attempts.jsonl": attempts,
    }.items():  # fmt: skip
        write(created.path / name, "".join(json.dumps(line) + "\n" for line in lines).encode())
    write(created.path / "samples" / "step_00000002.txt", b"The sample.\n")
    write(folder / "bpe.json", trained().encode())
    words = {
        "added_tokens": [{"id": 3, "content": "<|endoftext|>", "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "\\w+|[^\\w\\s]+"}, "behavior": "Isolated",
                          "invert": False},
        "post_processor": None, "decoder": None, "version": "1.0", "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {"war": 0, "and": 1, "<unk>": 2, "<|endoftext|>": 3},
                  "unk_token": "<unk>"},
    }  # fmt: skip
    write(folder / "words.json", json.dumps(words).encode())
    _token_files(folder / "token_files")


def _token_files(folder: Path) -> None:
    from tests.data.adopt import foreign

    few = foreign.DOCUMENTS[:40]
    for format_name, _, _ in TOKEN_FILES:
        (folder / format_name).mkdir(parents=True)
    foreign.tokens_of(folder)
    foreign.write_megatron(folder / "megatron" / "a.bin", few)
    foreign.write_raw(folder / "raw" / "a.bin", few)
    foreign.write_olmo(folder / "olmo" / "a.npy", few)
    array = np.array(foreign.flat(few), np.uint16)
    np.save(folder / "npy" / "a.npy", array)
