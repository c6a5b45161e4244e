"""The slices that are done: their names, their records, and what killed processes left beside them."""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.build.tasks import PLAN
from pipeline.data.manifest import MANIFEST, TOKENIZER, Shard
from pipeline.errors import DataError
from pipeline.files import is_temporary, read_json

SLICES = "slices"
RECORD = "slice.json"

Record = dict[str, Any]

_LEFT_OF_SLICE = re.compile(r"\.\d{6,}-\d{5,}\.[0-9a-f]{12}\.tmp")
_KINDS = {
    "slice": str,
    "source": str,
    "build": str,
    "last": bool,
    "records": int,
    "empty": int,
    "bad": dict,
    "cross_checked": int,
    "pieces": list,
    "shards": list,
}


def slice_name(task: int, part: int) -> str:
    """Name of part `part` of a task; names sort as tokens follow each other."""
    return f"{task:06d}-{part:05d}"


def finished(records: list[Record]) -> bool:
    """Whether the slices of a task are all there."""
    return bool(records) and bool(records[-1]["last"])


def any_published(folder: Path) -> bool:
    """Whether a slice of any task is done."""
    return any((folder / SLICES).glob(f"[0-9]*/{RECORD}"))


def published(folder: Path, task: int, build: str, dtype: np.dtype[Any]) -> list[Record]:
    """The records of the slices of a task that are done, in order.

    Raises:
        DataError: One was made by a build with other settings or another tokenizer, or is damaged.
    """
    records: list[Record] = []
    while not finished(records):
        file = folder / SLICES / slice_name(task, len(records)) / RECORD
        if not file.exists():
            break
        record = _load(file)
        if record["build"] != build:
            raise DataError(
                f"{file.parent}: belongs to a build with other settings or another tokenizer; "
                f"remove {folder} and prepare the dataset again"
            )
        for shard in record["shards"]:
            _check_sizes(folder, Shard(**shard), dtype)
        records.append(record)
    return records


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left behind, where that is allowed; only for when every slice is published."""
    for temp in (folder / SLICES).glob(".*.tmp"):
        if _LEFT_OF_SLICE.fullmatch(temp.name):
            shutil.rmtree(temp, ignore_errors=True)
    for file in folder.glob(".*.tmp"):
        if is_temporary(file, (MANIFEST, PLAN, TOKENIZER)):
            with contextlib.suppress(OSError):
                file.unlink()


def _load(file: Path) -> Record:
    record = read_json(file)
    whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in _KINDS.items())
    if not (whole and all(_is_shard(entry) for entry in record["shards"])):
        raise DataError(f"{file}: is not the record of a slice; {_again(file.parent)}")
    return dict(record)


def _is_shard(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == {field.name for field in fields(Shard)}


def _check_sizes(folder: Path, shard: Shard, dtype: np.dtype[Any]) -> None:
    for name, expected in shard.sizes(dtype).items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            has = "is missing" if size is None else f"has {size} bytes, the slice was published with {expected}"
            raise DataError(f"{file}: {has}; {_again(file.parent)}")


def _again(folder: Path) -> str:
    return f"remove the folder {folder} and run `pipeline prepare` again"
