"""The published slices: their records, and the temporary files that killed processes left beside them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.content import slice_problem
from pipeline.data.layout import MANIFEST, PLAN, SLICE_RECORD, SLICES, TOKENIZER, published_slices, slice_name
from pipeline.data.manifest import Shard, check_sizes
from pipeline.data.read.task import FileSpan
from pipeline.errors import DataError
from pipeline.files import discard, is_temporary, read_json

Record = dict[str, Any]

_LEFT_OF_SLICE = re.compile(r"\.\d{6,}-\d{5,}\.[0-9a-f]{12}\.tmp")


def finished(records: list[Record]) -> bool:
    """Returns whether all slices of a task are among its records."""
    return bool(records) and bool(records[-1]["last"])


def any_published(folder: Path) -> bool:
    """Returns whether a slice of any task is published."""
    return any((slice_folder / SLICE_RECORD).exists() for slice_folder in published_slices(folder))


def read_records(folder: Path, task: int, build: str, dtype: np.dtype[Any]) -> list[Record]:
    """Returns the records of the published slices of a task, in order.

    Raises:
        DataError: A slice is damaged, or was made with other settings or another tokenizer.
    """
    records: list[Record] = []
    while not finished(records):
        file = folder / SLICES / slice_name(task, len(records)) / SLICE_RECORD
        if not file.exists():
            _refuse_without_record(file.parent)
            break
        record = _load(file)
        if record["build"] != build:
            raise DataError(
                f"{file.parent}: belongs to a build with other settings or another tokenizer; "
                f"remove {folder} and prepare the dataset again"
            )
        check_sizes(folder, (Shard(**shard) for shard in record["shards"]), dtype, remake(file.parent))
        records.append(record)
    return records


def remake(folder: Path) -> str:
    """Returns what to do about a slice that cannot be used."""
    return f"remove the folder {folder} and run `pipeline prepare` again"


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of killed processes where permissions allow; call once every slice is published."""
    for temp in (folder / SLICES).glob(".*.tmp"):
        if _LEFT_OF_SLICE.fullmatch(temp.name):
            discard(temp)
    for file in folder.glob(".*.tmp"):
        if is_temporary(file, (MANIFEST, PLAN, TOKENIZER)):
            with contextlib.suppress(OSError):
                file.unlink()


def _load(file: Path) -> Record:
    record = read_json(file, file.parent, DataError)
    problem = slice_problem(record)
    if problem is not None:
        raise DataError(f"{file}: is not the record of a slice ({problem}); {remake(file.parent)}")
    # Slices of older versions do not say what was lost. There may be a million files.
    return {**record, "pieces": [FileSpan(**piece) for piece in record["pieces"]]}


def _refuse_without_record(folder: Path) -> None:
    """Refuses a slice that has lost its record: another could not be published in its place."""
    # The record last: another process may publish the slice meanwhile, and that makes both visible at once.
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SLICE_RECORD).exists():
        raise DataError(f"{folder / SLICE_RECORD}: is missing; {remake(folder)}")
