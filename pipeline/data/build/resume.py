"""The plan in the dataset folder: recorded, compared with, and replaced as long as nothing was made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.data.build.tasks import PLAN, PLAN_VERSION, Plan
from pipeline.data.fingerprint import changed_settings
from pipeline.data.manifest import TOKENIZER
from pipeline.data.read.sources import SourceFile, stamp_of
from pipeline.data.read.task import Task
from pipeline.errors import DataError, PipelineError
from pipeline.files import read_json, write_text


def agree(folder: Path, plan: Plan, begun: bool) -> Plan:
    """Records the plan in the dataset folder, or compares it with the one that is there.

    As long as no slice is published, another plan replaces the recorded one: a first start that failed must not bind
    the next one to the setting or the file that it failed for. The tokenizer goes with it, since it was made from both.

    Args:
        folder: The dataset folder.
        plan: The plan as it is now.
        begun: Whether a slice is published.

    Returns:
        The recorded plan, whose file stamps are those of the first start.

    Raises:
        DataError: The folder was begun with other settings or other sources.
    """
    file = folder / PLAN
    if file.exists() and begun:
        return _load_equal(file, plan)
    if file.exists() and not _is_recorded(file, plan):
        (folder / TOKENIZER).unlink(missing_ok=True)
        record(folder, plan)
    elif not file.exists():
        record(folder, plan)
    return plan


def record(folder: Path, plan: Plan) -> None:
    """Writes the plan into the dataset folder."""
    tree = {"plan_version": PLAN_VERSION, "settings": plan.settings, "files": plan.files, "tasks": plan.tasks}
    # Without line breaks, and without a copy as dictionaries: there may be hundreds of thousands of files.
    write_text(folder / PLAN, json.dumps(tree, default=_fields, ensure_ascii=False, separators=(",", ":")) + "\n")


class PlanGuard:
    """Notices that the folder was begun anew, by a start with other settings, since `agree`."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._file = folder / PLAN
        self._plan = plan
        self._stamp = stamp_of(str(self._file))

    def check(self) -> None:
        """Raises DataError if the recorded plan is another one by now."""
        stamp = stamp_of(str(self._file))
        if stamp != self._stamp and stamp is not None:
            _load_equal(self._file, self._plan)
            self._stamp = stamp


def _load(file: Path) -> Plan:
    tree = read_json(file)
    version = tree.get("plan_version") if isinstance(tree, dict) else None
    if version != PLAN_VERSION:
        raise DataError(
            f"{file}: has the version {version}, this program writes {PLAN_VERSION}; "
            f"remove {file.parent} and prepare the dataset again"
        )
    try:
        changed_settings(tree["settings"], tree["settings"])
        return Plan(
            tree["settings"],
            tuple(tuple(SourceFile(**{**f, "stamp": tuple(f["stamp"])}) for f in files) for files in tree["files"]),
            tuple(Task(**{**t, "files": tuple(t["files"])}) for t in tree["tasks"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: is damaged ({type(error).__name__}: {error}); remove {file.parent} and prepare the dataset again"
        ) from error


def _load_equal(file: Path, plan: Plan) -> Plan:
    old = _load(file)
    problems = [*changed_settings(old.settings, plan.settings), *_changed_files(old.files, plan.files)]
    if problems:
        raise DataError(
            "\n".join(
                [
                    f"{file.parent}: was begun with other settings or sources; "
                    "mixing them would make a dataset of neither:",
                    *(f"  {p}" for p in problems[:20]),
                    *([f"  and {len(problems) - 20} more"] if len(problems) > 20 else []),
                    "Choose another data.path, or remove the folder to start over.",
                ]
            )
        )
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
        problems += [f"{p}: was there then, is not now" for p in before.keys() - after.keys()]
        problems += [f"{p}: is new" for p in after.keys() - before.keys()]
        for path in before.keys() & after.keys():
            was, now = before[path], after[path]
            if was.size != now.size:
                problems.append(f"{path}: had {was.size} bytes then, has {now.size} now")
            if was.format != now.format:
                problems.append(f"{path}: was read as {was.format} then, would be as {now.format} now")
    return sorted(problems)
