"""The work of a build, cut into tasks before anything is read: a function of the settings and the file sizes alone.

A task is the unit that `--slice I/N` deals out. It publishes one slice (a folder of shards), or, where it is
a large compressed file, which can only be read from its start, one slice after another.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.data_sections import SourceConfig
from pipeline.config.sections import Config
from pipeline.data.fingerprint import settings_of
from pipeline.data.read.parquet import row_group_sizes
from pipeline.data.read.record_blocks import can_overlap
from pipeline.data.read.sources import SourceFile, find_files
from pipeline.data.read.task import Task
from pipeline.errors import DataError

PLAN = "plan.json"
PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the bytes of the dataset.

    Attributes:
        settings: The settings of the config that matter.
        files: The files of each source.
        tasks: The work.
    """

    settings: dict[str, Any]
    files: tuple[tuple[SourceFile, ...], ...]
    tasks: tuple[Task, ...]


def make_plan(config: Config) -> Plan:
    """Looks at the sources and divides the work.

    Raises:
        DataError: A source has no files or files that cannot be read, or has one twice.
    """
    files = tuple(tuple(find_files(source)) for source in config.data.sources)
    _refuse_names_without_text(files)
    _refuse_shared_files(config.data.sources, files)
    slice_bytes = int(config.data.slice_size_mb * 1e6)
    tasks: list[Task] = []
    for index, (source, found) in enumerate(zip(config.data.sources, files, strict=True)):
        tasks += _tasks_of(index, source, found, slice_bytes, len(tasks))
    return Plan(settings_of(config), files, tuple(tasks))


def share(tasks: Sequence[Task], slice_spec: tuple[int, int] | None) -> list[Task]:
    """The tasks of part `I` of `N`, counted from 1; all of them without a part."""
    if slice_spec is None:
        return list(tasks)
    part, parts = slice_spec
    return list(tasks[part - 1 :: parts])


def _refuse_names_without_text(files: Sequence[Sequence[SourceFile]]) -> None:
    for file in (file for found in files for file in found):
        try:
            file.path.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(file.path).decode(errors="backslashreplace")
            raise DataError(
                f"{shown}: the file's name is no UTF-8, which the records of a dataset are written in; rename the file"
            ) from error


def _refuse_shared_files(sources: Sequence[SourceConfig], files: Sequence[Sequence[SourceFile]]) -> None:
    owners: dict[str, tuple[str, str]] = {}
    for source, found in zip(sources, files, strict=True):
        for file in found:
            other, owner = owners.setdefault(str(Path(file.path).resolve()), (file.path, source.name))
            if (other, owner) == (file.path, source.name):
                continue
            of = (
                f"of source {source.name!r}"
                if owner == source.name
                else f"in the sources {owner!r} and {source.name!r}"
            )
            raise DataError(
                f"{file.path}: is the same file as {other}, both {of}; its text would be counted twice: narrow `paths`"
            )


def _tasks_of(
    index: int, source: SourceConfig, files: Sequence[SourceFile], slice_bytes: int, first: int
) -> list[Task]:
    """Small files together, a large one in parts: by bytes where it can be entered anywhere, else while it is read."""
    tasks: list[Task] = []
    group: list[int] = []
    group_bytes = 0

    def add(
        kind: Literal["files", "range", "stream", "rows"], members: Sequence[int], start: int = 0, stop: int = -1
    ) -> None:
        tasks.append(Task(first + len(tasks), index, kind, tuple(members), start, stop))

    def close_group() -> None:
        nonlocal group_bytes
        if group:
            add("files", group)
        group.clear()
        group_bytes = 0

    for number, file in enumerate(files):
        kind = _kind(source, file) if file.size > slice_bytes else "files"
        if kind != "files":
            close_group()
            if kind == "stream":
                add("stream", [number])
            elif kind == "range":
                for start in range(0, file.size, slice_bytes):
                    add("range", [number], start, start + slice_bytes)
            else:
                for start, stop in _row_ranges(file, slice_bytes):
                    add("rows", [number], start, stop)
            continue
        if group_bytes + file.size > slice_bytes:
            close_group()
        group.append(number)
        group_bytes += file.size
    close_group()
    return tasks


def _kind(source: SourceConfig, file: SourceFile) -> Literal["files", "range", "stream", "rows"]:
    """How a large file is read."""
    if file.format == "parquet":
        return "files" if file.compression else "rows"
    if file.format == "txt" and source.separator is None:
        return "files"
    overlapping = file.format == "txt" and can_overlap((source.separator or "").encode())
    return "stream" if file.compression or overlapping else "range"


def _row_ranges(file: SourceFile, slice_bytes: int) -> list[tuple[int, int]]:
    """Row groups that follow each other and together have at least the size of a slice, before compression."""
    sizes = row_group_sizes(file)
    if not sizes:
        return [(0, -1)]  # reading it will say what is wrong
    ranges, start, size = [], 0, 0
    for group, group_size in enumerate(sizes):
        size += group_size
        if size >= slice_bytes or group == len(sizes) - 1:
            ranges.append((start, group + 1))
            start, size = group + 1, 0
    return ranges


def task_bytes(plan: Plan) -> list[int]:
    """The bytes of files that each task reads, by its number; of Parquet, what its row groups are of their file."""
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
    if task.kind == "rows" and groups > 0:
        return first // groups * (task.stop - task.start)
    return sum(files[number].size for number in task.files)
