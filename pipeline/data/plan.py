"""The work of a build, cut into tasks before anything is read: a function of the settings and the file sizes alone.

A task is the unit that `--slice I/N` deals out. It publishes one slice (a folder of shards), or, where it is
a large compressed file, which can only be read from its start, one slice after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import Config, SourceConfig
from pipeline.data.blocks import can_overlap
from pipeline.data.parquet import row_group_sizes
from pipeline.data.sources import SourceFile, find_files
from pipeline.errors import DataError
from pipeline.files import read_json, write_json

PLAN = "plan.json"
PLAN_VERSION = 1


@dataclass(frozen=True)
class Task:
    """Something that one worker reads from start to end.

    Attributes:
        number: Place in the plan; slices are named after it and shards are ordered by it.
        source: Index of the source.
        kind: `files`: whole files; `range`: the records that begin in a range of bytes of one plain file;
            `stream`: one large file, cut into slices while it is read; `rows`: a range of a Parquet file's row groups.
        files: Indices of the source's files.
        start: First byte or row group.
        stop: The one after the last; -1 means to the end.
    """

    number: int
    source: int
    kind: Literal["files", "range", "stream", "rows"]
    files: tuple[int, ...]
    start: int = 0
    stop: int = -1


@dataclass(frozen=True)
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
        DataError: A source has no files or files that cannot be read.
    """
    files = tuple(tuple(find_files(source)) for source in config.data.sources)
    _refuse_shared_files(config.data.sources, files)
    slice_bytes = int(config.data.slice_size_mb * 1e6)
    tasks: list[Task] = []
    for index, (source, found) in enumerate(zip(config.data.sources, files, strict=True)):
        tasks += _tasks_of(index, source, found, slice_bytes, len(tasks))
    return Plan(_settings(config), files, tuple(tasks))


def share(tasks: Sequence[Task], slice_spec: tuple[int, int] | None) -> list[Task]:
    """The tasks of part `I` of `N`, counted from 1; all of them without a part."""
    if slice_spec is None:
        return list(tasks)
    part, parts = slice_spec
    return list(tasks[part - 1 :: parts])


def agree(folder: Path, plan: Plan) -> Plan:
    """Records the plan in the dataset folder, or compares it with the one that is there.

    Returns:
        The recorded plan, whose file stamps are those of the first start.

    Raises:
        DataError: The folder was begun with other settings or other sources.
    """
    file = folder / PLAN
    if not file.exists():
        record(folder, plan)
        return plan
    old = _load(file)
    problems = [*_changed_settings(old.settings, plan.settings), *_changed_files(old.files, plan.files)]
    if problems:
        raise DataError(
            "\n".join(
                [
                    f"{folder}: was begun with other settings or sources; mixing them would make a dataset of neither:",
                    *(f"  {p}" for p in problems[:20]),
                    *([f"  and {len(problems) - 20} more"] if len(problems) > 20 else []),
                    "Choose another data.path, or remove the folder to start over.",
                ]
            )
        )
    return old


def record(folder: Path, plan: Plan) -> None:
    """Writes the plan into the dataset folder."""
    write_json(folder / PLAN, {"plan_version": PLAN_VERSION, **asdict(plan)})


def tokenizer_differences(settings: dict[str, Any], config: Config) -> list[str]:
    """In what the tokenizer a dataset was made with is not the config's; a line a setting.

    Args:
        settings: `settings` of the dataset's manifest.
        config: The experiment.
    """
    return _changed_settings(settings["tokenizer"], _settings(config)["tokenizer"], "tokenizer.")


def _settings(config: Config) -> dict[str, Any]:
    data, tokenizer = config.data, config.tokenizer
    return {
        "sources": [
            {
                "name": s.name,
                "separator": s.separator,
                "field": s.field,
                "split": s.split,
            }
            for s in data.sources
        ],
        "validation_fraction": data.validation_fraction,
        "dtype": data.dtype,
        "slice_size_mb": data.slice_size_mb,
        "max_document_mb": data.max_document_mb,
        "tokenizer": {
            "kind": tokenizer.kind,
            "end_of_text": tokenizer.end_of_text,
            **({"special_tokens": list(tokenizer.special_tokens)} if tokenizer.kind == "bytes" else {}),
            **(
                {
                    "special_tokens": list(tokenizer.special_tokens),
                    "split_pattern": tokenizer.split_pattern,
                    "train_sample_mb": tokenizer.train_sample_mb,
                    "vocab_size": config.model.vocab_size,
                }
                if tokenizer.kind == "bpe"
                else {}
            ),
        },
    }


def _refuse_shared_files(sources: Sequence[SourceConfig], files: Sequence[Sequence[SourceFile]]) -> None:
    owners: dict[Path, str] = {}
    for source, found in zip(sources, files, strict=True):
        for file in found:
            real = Path(file.path).resolve()
            if owners.setdefault(real, source.name) != source.name:
                raise DataError(
                    f"{file.path}: is in the sources {owners[real]!r} and {source.name!r}; "
                    "a file in two sources would be counted twice: narrow one of the patterns"
                )


def _tasks_of(
    index: int, source: SourceConfig, files: Sequence[SourceFile], slice_bytes: int, first: int
) -> list[Task]:
    """Small files together, a large one in parts: by bytes where it can be entered anywhere, else while it is read."""
    tasks: list[Task] = []
    group: list[int] = []

    def add(
        kind: Literal["files", "range", "stream", "rows"], members: Sequence[int], start: int = 0, stop: int = -1
    ) -> None:
        tasks.append(Task(first + len(tasks), index, kind, tuple(members), start, stop))

    def close_group() -> None:
        if group:
            add("files", group)
            group.clear()

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
        if group and sum(files[i].size for i in group) + file.size > slice_bytes:
            close_group()
        group.append(number)
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


def _load(file: Path) -> Plan:
    tree = read_json(file)
    if tree.get("plan_version") != PLAN_VERSION:
        raise DataError(
            f"{file}: was written by another version of this program; remove the folder and prepare it again"
        )
    return Plan(
        tree["settings"],
        tuple(tuple(SourceFile(**{**f, "stamp": tuple(f["stamp"])}) for f in files) for files in tree["files"]),
        tuple(Task(**{**t, "files": tuple(t["files"])}) for t in tree["tasks"]),
    )


def _changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    problems = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            problems += _changed_settings(before, after, f"{prefix}{key}.")
        elif before != after:
            problems.append(f"{prefix}{key}: {before!r} then, {after!r} now")
    return problems


def _changed_files(old: Sequence[Sequence[SourceFile]], new: Sequence[Sequence[SourceFile]]) -> list[str]:
    problems = []
    for before_files, after_files in zip(old, new, strict=False):
        before, after = {f.path: f for f in before_files}, {f.path: f for f in after_files}
        problems += [f"{p}: was there then, is not now" for p in before.keys() - after.keys()]
        problems += [f"{p}: is new" for p in after.keys() - before.keys()]
        for path in before.keys() & after.keys():
            was, now = before[path], after[path]
            if was.size != now.size:
                problems.append(f"{path}: had {was.size} bytes then, has {now.size} now")
            if was.format != now.format:
                problems.append(f"{path}: was read as {was.format} then, would be as {now.format} now")
    return sorted(problems)
