"""Whether files that were touched since the build began still hold what the published slices were made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.config.sections import Config
from pipeline.data.build.slice_store import Record
from pipeline.data.build.tasks import Plan
from pipeline.data.read.task import FileSpan, Task
from pipeline.data.read.task_reader import read_task
from pipeline.errors import DataError


def touched_files(old: Plan, new: Plan) -> set[tuple[int, int]]:
    """Source and index of the files whose stamps differ."""
    return {
        (source, number)
        for source, (before, after) in enumerate(zip(old.files, new.files, strict=True))
        for number, (a, b) in enumerate(zip(before, after, strict=True))
        if a.stamp != b.stamp
    }


def refuse_changed_content(
    config: Config, plan: Plan, touched: set[tuple[int, int]], records: dict[int, list[Record]]
) -> None:
    """Reads the touched files again as far as slices were made from them, and compares digests.

    A file that was copied or `touch`ed has a new stamp and the old content, and the work done stays good.

    Args:
        config: The experiment.
        plan: The plan as it is now.
        touched: Source and index of the files.
        records: The published slices of each task.

    Raises:
        DataError: A file holds something else; the message names it.
    """
    for task in plan.tasks:
        if not records[task.number] or not any((task.source, number) in touched for number in task.files):
            continue
        expected = [FileSpan(**piece) for record in records[task.number] for piece in record["pieces"]]
        for was, now in zip(expected, _pieces(config, plan, task), strict=False):
            # `last` may differ where a stream was not read to its end.
            if (was.file, was.start, was.stop, was.sha256) != (now.file, now.start, now.stop, now.sha256):
                file = plan.files[task.source][was.file].path
                raise DataError(
                    f"{file}: was changed after slices of {Path(config.data.path)} were made from it; "
                    "restore it, or remove the dataset folder to start over"
                )


def _pieces(config: Config, plan: Plan, task: Task) -> Sequence[FileSpan]:
    # What is bad in it is no matter here: the digests are of the bytes.
    data = config.data.model_copy(update={"on_bad": "skip"})
    events = read_task(task, config.data.sources[task.source], plan.files[task.source], data)
    return [event for event in events if isinstance(event, FileSpan)]
