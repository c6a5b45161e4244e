"""Divides a build into tasks before anything is read, by the settings and the file sizes alone.

A task is the unit that `--slice I/N` distributes. It publishes one slice (a folder of shards); a large compressed
file, which can only be read from its start, publishes one slice after another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.data_sections import SourceConfig
from pipeline.config.sections import Config
from pipeline.data.fingerprint import settings_of
from pipeline.data.layout import MANIFEST
from pipeline.data.read.formats.table import FORMATS
from pipeline.data.read.sources import SourceFile, find_files, identity_of, refuse_undecodable_name
from pipeline.data.read.task import Part, Task
from pipeline.errors import DataError

# Version 1 chose the documents for validation by SHA-256, which took a tenth of a build's CPU time.
PLAN_VERSION = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the bytes of the dataset."""

    settings: dict[str, Any]
    """See `fingerprint.settings_of`."""
    files: tuple[tuple[SourceFile, ...], ...]
    """The files of each source."""
    tasks: tuple[Task, ...]
    """The work, in the order of the dataset."""
    version: int = PLAN_VERSION
    """Another one is that of a dataset that an older version of this program began."""


def make_plan(config: Config) -> Plan:
    """Finds the files of the sources and divides the work.

    Raises:
        DataError: A source has no files, has a file that cannot be read, or shares a file with another source.
    """
    files = tuple(tuple(find_files(source)) for source in config.data.sources)
    for file in (file for found in files for file in found):
        refuse_undecodable_name(file.path)
    # The files of a finished dataset were read as they are; some versions took hard links for files of their own.
    finished = (Path(config.data.path) / MANIFEST).exists()
    _refuse_shared_files(config.data.sources, files, _real_name if finished else identity_of)
    slice_bytes = int(config.data.slice_size_mb * 1e6)
    tasks: list[Task] = []
    for index, (source, found) in enumerate(zip(config.data.sources, files, strict=True)):
        tasks += _tasks_of(index, source, found, slice_bytes, len(tasks))
    return Plan(settings_of(config), files, tuple(tasks))


def share(tasks: Sequence[Task], slice_spec: tuple[int, int] | None) -> list[Task]:
    """Returns the tasks of part `I` of `N`, counted from 1; all tasks if there are no parts."""
    if slice_spec is None:
        return list(tasks)
    part, parts = slice_spec
    return list(tasks[part - 1 :: parts])


def _real_name(path: str) -> str:
    return str(Path(path).resolve())


def _refuse_shared_files(
    sources: Sequence[SourceConfig], files: Sequence[Sequence[SourceFile]], identity: Callable[[str], Hashable]
) -> None:
    named = [(source.name, file) for source, found in zip(sources, files, strict=True) for file in found]
    # Names of one file have one inode. Only those few are looked at again.
    _, first, times = np.unique([file.stamp[2] for _, file in named], return_index=True, return_counts=True)
    if len(first) == len(named):
        return
    shared = {named[index][1].stamp[2] for index in first[times > 1].tolist()}
    owners: dict[Hashable, tuple[str, str]] = {}
    for name, file in named:
        if file.stamp[2] not in shared:
            continue
        other, owner = owners.setdefault(identity(file.path), (file.path, name))
        if (other, owner) == (file.path, name):
            continue
        of = f"of source {name!r}" if owner == name else f"in the sources {owner!r} and {name!r}"
        raise DataError(
            f"{file.path}: is the same file as {other}, both {of}; its text would be counted twice: narrow `paths`"
        )


def _tasks_of(
    index: int, source: SourceConfig, files: Sequence[SourceFile], slice_bytes: int, first: int
) -> list[Task]:
    """Returns the tasks of a source: small files together, a large one divided as its format can be."""
    tasks: list[Task] = []
    group: list[int] = []
    group_bytes = 0

    def add(part: Part, members: Sequence[int]) -> None:
        tasks.append(Task(first + len(tasks), index, part.kind, tuple(members), part.start, part.stop))

    def close_group() -> None:
        nonlocal group_bytes
        if group:
            add(Part("files"), group)
        group.clear()
        group_bytes = 0

    for number, file in enumerate(files):
        parts = FORMATS[file.format](source).split(file, slice_bytes) if file.size > slice_bytes else []
        if parts:
            close_group()
            for part in parts:
                add(part, [number])
            continue
        if group_bytes + file.size > slice_bytes:
            close_group()
        group.append(number)
        group_bytes += file.size
    close_group()
    return tasks


def task_bytes(plan: Plan) -> list[int]:
    """Returns the bytes that each task reads, by its number; for Parquet, its row groups' share of their file."""
    groups: dict[tuple[int, int], int] = {}
    for task in plan.tasks:
        if task.kind == "rows":
            place = task.source, task.files[0]
            groups[place] = max(groups.get(place, 0), task.stop)
    return [
        _bytes_of(task, plan.files[task.source], groups.get((task.source, task.files[0]), 0)) for task in plan.tasks
    ]


def _bytes_of(task: Task, files: Sequence[SourceFile], groups: int) -> int:
    first = files[task.files[0]].size
    if task.kind == "range":
        return min(first, task.stop) - task.start
    if task.kind == "rows" and groups > 0 and task.stop >= 0:
        return first // groups * (task.stop - task.start)
    return sum(files[number].size for number in task.files)
