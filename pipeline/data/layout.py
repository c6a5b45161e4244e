"""The names of the files in a dataset folder.

manifest.json                    the dataset's description and digests; there once the dataset is finished
plan.json                        what the build reads and how it divides the work
tokenizer.json                   the tokenizer of all shards
slices/000000-00000/             one folder per slice: its task and its part of that task
    slice.json                   the slice's record: shards, counts and what it was made from
    train.bin, validation.bin    the tokens of each split
    train.idx, validation.idx    the offset of each document in them
packing/513/                     the index of packed windows of 513 tokens; see `order/packing.py`
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer.json"
SLICES = "slices"
SLICE_RECORD = "slice.json"


def slice_name(task: int, part: int) -> str:
    """Returns the folder name of one part of a task; names sort in the order of the tokens."""
    return f"{task:06d}-{part:05d}"


def published_slices(dataset: Path) -> Iterator[Path]:
    """Yields the folders of the published slices, in no particular order."""
    return (dataset / SLICES).glob("[0-9]*")
