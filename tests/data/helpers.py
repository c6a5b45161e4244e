"""Small corpora in every format, and configs to build them with."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import itertools
import json
import lzma
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from pipeline.cli.main import main
from pipeline.config.sections import Config
from pipeline.data.build.build import prepare
from pipeline.data.layout import PLAN, TOKENIZER
from pipeline.data.manifest import DatasetManifest, Split
from pipeline.data.tokenize.tokenizer import Tokenizer
from pipeline.data.tokenize.train import train_bpe
from pipeline.files import sha256_file

COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    # Checksums are optional and off by default in this format; they reveal damage inside a frame.
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}

# fmt: off
_WORDS = [
    "the", "of", "and", "to", "in", "a", "state", "union", "people", "congress", "war",
    "peace", "law", "money", "naïve", "Zürich", "北京", "🙂", "don't", "it's", "1790", "12,345",
    "government", "<|endoftext|>", "liberty", "justice", "treaty\ttariff", "", "commerce", "nation;", "—",
    "“quoted”", "ümlaut",
]
# fmt: on


def documents(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of random words, some with line breaks or with the text of the special token."""
    rng = random.Random(seed)
    return [
        f"{i} "
        + "".join(rng.choice(_WORDS) + rng.choice([" ", " ", " ", "\n"]) for _ in range(rng.randint(1, longest)))
        + "."
        for i in range(count)
    ]


SPEECHES = [*documents(100, seed=4), "<script>alert(1)</script> & co"]


def config(
    folder: Path, sources: Sequence[dict[str, Any]], *, tokenizer: dict[str, Any] | None = None, **data: Any
) -> Config:
    """A config whose dataset is `folder`; the vocabulary of the model fits every tokenizer."""
    kind = tokenizer or {"kind": "bytes"}
    tree = {
        "name": "test",
        "data": {"path": str(folder), "sources": list(sources), "validation_fraction": 0.0, **data},
        "tokenizer": kind,
        "model": {"vocab_size": 300, "context_length": 8, "d_model": 8, "num_layers": 1, "num_heads": 1, "d_ff": 8},
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "warmup_iters": 1, "cosine_cycle_iters": 2},
        "train": {"batch_size": 4, "micro_batch_size": 4, "max_iters": 2},
    }
    return Config.model_validate_json(json.dumps(tree))


def command(*arguments: str) -> int:
    """Runs the command line in this process and returns its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr("sys.argv", ["pipeline", *arguments])
        patch.setenv("COLUMNS", "120")
        main()
    return int(stopped.value.code or 0)


def jsonl(texts: Sequence[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)).encode()


def write_parquet(path: Path, texts: Sequence[str | None], row_group_size: int = 10, column: str = "text") -> Path:
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


def write_arrow(path: Path, texts: list[str | None], kind: str = "stream", rows: int = 10, **options: str) -> Path:
    """Writes texts as `datasets` does: an IPC stream of batches, beside other columns."""
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, pyarrow.string())})
    make = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    settings = pyarrow.ipc.IpcWriteOptions(**options)
    with pyarrow.OSFile(str(path), "wb") as out, make(out, table.schema, options=settings) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def members(compression: str, content: bytes, parts: int = 3) -> bytes:
    """Returns `content` as several members or frames of one file, divided at arbitrary bytes."""
    bounds = [len(content) * i // parts for i in range(parts + 1)]
    return b"".join(COMPRESS[compression](content[a:b]) for a, b in itertools.pairwise(bounds))


def split_texts(folder: Path, split: str = "train") -> list[str]:
    """The documents of a dataset, decoded, without their end-of-text tokens."""
    manifest = DatasetManifest.load(folder)
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    texts = []
    for shard in manifest.splits[split].shards:
        tokens = np.fromfile(folder / shard.file, manifest.numpy_dtype)
        index = np.fromfile(folder / shard.index, "<u8").astype(int)
        assert index[0] == 0 and index[-1] == len(tokens) == shard.tokens
        for start, stop in itertools.pairwise(index):
            assert tokens[stop - 1] == tokenizer.end_of_text_id
            texts.append(tokenizer.decode(tokens[start : stop - 1]))
    return texts


def tree_digest(folder: Path) -> dict[str, str]:
    """The digest of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def dataset_digest(folder: Path) -> dict[str, str]:
    """Like `tree_digest`, without the plan, which holds the stamps of the source files."""
    return {name: digest for name, digest in tree_digest(folder).items() if name != PLAN}


def a_shard(folder: Path) -> Path:
    """The tokens of one of a dataset's training shards."""
    return folder / DatasetManifest.load(folder).splits["train"].shards[2].file


def cut_into_shards(folder: Path, into: Path, count: int) -> None:
    """Writes a dataset with the same tokens in the same order, whose training part has `count` shards."""
    manifest = DatasetManifest.load(folder)
    shutil.copytree(folder, into)
    training = manifest.splits["train"].shards
    tokens = np.concatenate([np.fromfile(folder / shard.file, manifest.numpy_dtype) for shard in training])
    shards = []
    for number, piece in enumerate(np.array_split(tokens, count)):
        file, index = into / f"piece_{number:05d}.bin", into / f"piece_{number:05d}.idx"
        piece.tofile(file)
        np.array([0, len(piece)], "<u8").tofile(index)
        named = {
            "file": file.name,
            "index": index.name,
            "sha256": sha256_file(file),
            "index_sha256": sha256_file(index),
        }
        shards.append(replace(training[0], tokens=len(piece), documents=1, longest=len(piece), **named))
    splits = {**manifest.splits, "train": Split("train", tuple(shards))}
    replace(manifest, splits=splits, digest="").save(into)


def one_source(path: Path, **source: Any) -> dict[str, Any]:
    """A source that holds one file, all of it for training."""
    return {"name": "s", "paths": [str(path)], "split": "train", **source}


def built_texts(tmp_path: Path, *paths: Path, slice_size_mb: float = 0.005, **source: Any) -> list[str]:
    """The training documents of a dataset that is built below `tmp_path` from one source."""
    entry = {"name": "s", "paths": [str(p) for p in paths], "split": "train", **source}
    prepare(config(tmp_path / "out", [entry], slice_size_mb=slice_size_mb))
    return split_texts(tmp_path / "out")


FORMAT_TEXTS = documents(400, seed=1)

END = "<|endoftext|>"
TOKENIZER_TEXTS = documents(200, seed=11)
TOKENIZER_SAMPLE = b"\xff".join(t.encode() for t in TOKENIZER_TEXTS)


def trained(pattern: Any = "gpt2", size: int = 600) -> str:
    """A tokenizer.json that is trained on `TOKENIZER_SAMPLE`."""
    return train_bpe(TOKENIZER_SAMPLE, b"\xff", size, [END, "<|pad|>"], pattern)


def save_tokenizer(tmp_path: Path, content: str) -> Path:
    return write(tmp_path / "tokenizer.json", content.encode())
