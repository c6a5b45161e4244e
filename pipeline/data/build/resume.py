"""Whether a build can resume: the recorded plan and the content of the sources must be what the slices came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.config.sections import Config
from pipeline.data.build.slice_store import Record
from pipeline.data.build.tasks import PLAN_VERSION, Plan
from pipeline.data.fingerprint import changed_settings
from pipeline.data.layout import PLAN, TOKENIZER
from pipeline.data.read.sources import SourceFile, stamp_of
from pipeline.data.read.task import FileSpan, Task
from pipeline.data.read.task_reader import read_task
from pipeline.errors import DataError, PipelineError, listing
from pipeline.files import read_json, write_text

_MOST_LISTED = 20
# A dataset of version 1 that is finished stays usable.
_READ_VERSIONS = (1, PLAN_VERSION)


def reconcile_plan(folder: Path, plan: Plan, begun: bool) -> Plan:
    """Records the plan in the dataset folder, or compares it with the recorded plan.

    Until a slice is published (`begun`), another plan replaces the recorded one: a first start that failed must not
    bind the next start to the setting or file that made it fail. The tokenizer, made from both, is removed too.

    Returns:
        The recorded plan, whose file stamps are those of the first start.

    Raises:
        DataError: The dataset was begun with other settings or other sources.
    """
    file = folder / PLAN
    if file.exists() and begun:
        return _load_equal(file, plan)
    if file.exists() and not _is_recorded(file, plan):
        (folder / TOKENIZER).unlink(missing_ok=True)
        record_plan(folder, plan)
    elif not file.exists():
        record_plan(folder, plan)
    return plan


def record_plan(folder: Path, plan: Plan) -> None:
    """Writes the plan into the dataset folder."""
    tree = {"plan_version": plan.version, "settings": plan.settings, "files": plan.files, "tasks": plan.tasks}
    # Without line breaks or a copy as dictionaries: there may be hundreds of thousands of files.
    write_text(folder / PLAN, json.dumps(tree, default=_fields, ensure_ascii=False, separators=(",", ":")) + "\n")


class PlanGuard:
    """Notices that a start with other settings replaced the recorded plan."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._file = folder / PLAN
        self._plan = plan
        self._stamp = stamp_of(str(self._file))

    def check(self) -> None:
        """Raises DataError if the recorded plan has become another one."""
        stamp = stamp_of(str(self._file))
        if stamp != self._stamp and stamp is not None:
            _load_equal(self._file, self._plan)
            self._stamp = stamp


def touched_files(old: Plan, new: Plan) -> set[tuple[int, int]]:
    """Returns source and index of the files whose stamps differ."""
    return {
        (source, number)
        for source, (before, after) in enumerate(zip(old.files, new.files, strict=True))
        for number, (a, b) in enumerate(zip(before, after, strict=True))
        if a.stamp != b.stamp
    }


def refuse_changed_content(
    config: Config, plan: Plan, touched: set[tuple[int, int]], records: dict[int, list[Record]]
) -> None:
    """Rereads the touched files as far as the published slices were made from them, and compares digests.

    A file that was copied or `touch`ed has a new stamp and its old content, and its slices stay valid.

    Raises:
        DataError: The content of a file changed; the message names the file.
    """
    for task in plan.tasks:
        if not records[task.number] or not any((task.source, number) in touched for number in task.files):
            continue
        expected = [span for record in records[task.number] for span in record["pieces"]]
        for was, now in zip(expected, _reread(config, plan, task), strict=False):
            # `last` may differ where a stream was not read to its end.
            if (was.file, was.start, was.stop, was.sha256) != (now.file, now.start, now.stop, now.sha256):
                file = plan.files[task.source][was.file].path
                raise DataError(
                    f"{file}: was changed after slices of {Path(config.data.path)} were made from it; "
                    "restore it, or remove the dataset folder to start over"
                )


def refuse_older_version(folder: Path, plan: Plan) -> None:
    """Refuses to write slices into a dataset that an older version began, whose documents went to other splits."""
    if plan.version != PLAN_VERSION:
        raise DataError(
            f"{folder}: was begun by an older version of this program (plan_version {plan.version}, now "
            f"{PLAN_VERSION}), which chose other documents for validation; finish it with that version, "
            "or remove the folder to start over"
        )


def _reread(config: Config, plan: Plan, task: Task) -> list[FileSpan]:
    # Bad records do not matter here: the digests are of the bytes.
    data = config.data.model_copy(update={"on_bad": "skip"})
    events = read_task(task, config.data.sources[task.source], plan.files[task.source], data)
    return [event for event in events if isinstance(event, FileSpan)]


def _load(file: Path) -> Plan:
    tree = read_json(file)
    version = tree.get("plan_version") if isinstance(tree, dict) else None
    if version not in _READ_VERSIONS:
        raise DataError(
            f"{file}: plan_version is {version}, this program writes {PLAN_VERSION}; "
            f"remove {file.parent} and prepare the dataset again"
        )
    try:
        changed_settings(tree["settings"], tree["settings"])
        return Plan(
            tree["settings"],
            tuple(tuple(SourceFile(**{**f, "stamp": tuple(f["stamp"])}) for f in files) for files in tree["files"]),
            tuple(Task(**{**t, "files": tuple(t["files"])}) for t in tree["tasks"]),
            version,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: is damaged ({type(error).__name__}: {error}); remove {file.parent} and prepare the dataset again"
        ) from error


def _load_equal(file: Path, plan: Plan) -> Plan:
    old = _load(file)
    problems = [*changed_settings(old.settings, plan.settings), *_changed_files(old.files, plan.files)]
    if problems:
        shown = problems[:_MOST_LISTED]
        if len(problems) > _MOST_LISTED:
            shown.append(f"and {len(problems) - _MOST_LISTED} more")
        title = f"{file.parent}: was begun with other settings or sources, which must not be mixed in one dataset:"
        raise DataError(listing(title, shown, "Choose another data.path, or remove the folder to start over."))
    return old


def _is_recorded(file: Path, plan: Plan) -> bool:
    try:
        return _load(file) == plan
    except PipelineError:
        return False


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _changed_files(old: Sequence[Sequence[SourceFile]], new: Sequence[Sequence[SourceFile]]) -> list[str]:
    problems = []
    for before_files, after_files in zip(old, new, strict=False):
        before, after = {f.path: f for f in before_files}, {f.path: f for f in after_files}
        problems += [f"{p}: was there before, is missing now" for p in before.keys() - after.keys()]
        problems += [f"{p}: is new" for p in after.keys() - before.keys()]
        for path in before.keys() & after.keys():
            was, now = before[path], after[path]
            if was.size != now.size:
                problems.append(f"{path}: had {was.size} bytes before, has {now.size} now")
            if was.format != now.format:
                problems.append(f"{path}: was read as {was.format} before, would be read as {now.format} now")
    return sorted(problems)
