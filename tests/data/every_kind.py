"""A dataset with one source of each kind, for tests of builds that are divided or interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.config.sections import Config
from tests.data.helpers import COMPRESS, config, documents, jsonl, write, write_arrow, write_parquet

TEXTS = documents(300, seed=5)
TOKENIZER = {"kind": "bpe", "special_tokens": ["<|pad|>"]}


def sources_of_every_kind(folder: Path) -> list[dict[str, Any]]:
    """One source of each kind: whole files, ranges of lines, an archive read as a stream, row groups."""
    for i, text in enumerate(TEXTS[:60]):
        write(folder / "whole" / f"{i:02d}.txt", text.encode())
    write(folder / "lines.jsonl", jsonl(TEXTS[60:150]))
    write(folder / "packed.jsonl.gz", COMPRESS["gz"](jsonl(TEXTS[150:230] * 4)))
    write_parquet(folder / "rows.parquet", TEXTS[230:270])
    write_arrow(folder / "batches.arrow", TEXTS[270:])
    return [
        {"name": "whole", "paths": [str(folder / "whole" / "*.txt")]},
        {"name": "lines", "paths": [str(folder / "lines.jsonl")]},
        {"name": "packed", "paths": [str(folder / "packed.jsonl.gz")], "split": "train"},
        {"name": "rows", "paths": [str(folder / "rows.parquet")]},
        {"name": "batches", "paths": [str(folder / "batches.arrow")], "where": "id != 3"},
    ]


def config_of_every_kind(tmp_path: Path, name: str, **data: Any) -> Config:
    sources = (
        sources_of_every_kind(tmp_path / "in")
        if not (tmp_path / "in").exists()
        else paths_of_every_kind(tmp_path / "in")
    )
    settings = {"slice_size_mb": 0.003, "validation_fraction": 0.1, **data}
    return config(tmp_path / name, sources, tokenizer=TOKENIZER, **settings)


def paths_of_every_kind(folder: Path) -> list[dict[str, Any]]:
    kept = folder.with_name("again")
    shutil.rmtree(kept, ignore_errors=True)
    entries = sources_of_every_kind(kept)
    shutil.rmtree(kept)
    return [{**e, "paths": [p.replace(str(kept), str(folder)) for p in e["paths"]]} for e in entries]
