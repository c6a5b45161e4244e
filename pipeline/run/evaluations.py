"""The results of tasks in a run folder: `evaluations/step_00001000/NAME.json`.

A name is that of a task, of a group or of a tag of lm-evaluation-harness; behind it stands how it was asked.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.files import sha256_bytes
from pipeline.run.folder import Run, step_in, step_name
from pipeline.run.records import read_checked

_Count = Annotated[int, Field(ge=0, le=1 << 53)]


class TaskMetric(TypedDict):
    """One metric of a task or group; None is a value that is not finite, or a standard error that nobody knows."""

    value: float | None
    stderr: float | None
    higher_is_better: NotRequired[bool | None]


class TaskScores(TypedDict):
    """The metrics of a task, or of a group of them."""

    documents: _Count
    metrics: dict[str, TaskMetric]
    """By name; a filter other than the harness's default is part of it: `exact_match/strict-match`."""
    hash: NotRequired[str]
    """Of a task's documents, prompts and targets, as the harness computes it; a group has none."""
    version: NotRequired[str | None]
    """Of the task, by the harness."""
    num_fewshot: NotRequired[_Count]


class TaskEvaluation(TypedDict):
    """One file: what a name stands for, on one checkpoint."""

    name: str
    step: _Count
    checkpoint: str
    """The checkpoint's digest."""
    time: float
    seconds: float
    harness: str
    """Version of lm-evaluation-harness."""
    limit: _Count | None
    """Documents of each task; None for all."""
    num_fewshot: _Count | None
    """As asked for; None leaves it to the task."""
    definition: NotRequired[str]
    """Digest of what the tasks and groups say: choices, metrics, settings of generation, filters, weights."""
    tasks: dict[str, TaskScores]
    groups: dict[str, TaskScores]


TASK_EVALUATION: TypeAdapter[TaskEvaluation] = TypeAdapter(TaskEvaluation)


def data_cache() -> Path:
    """Returns where the libraries of lm-evaluation-harness keep the data of tasks."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser()


def suffix(num_fewshot: int | None, limit: int | None) -> str:
    """Returns what tells evaluations of one task from each other, in names of files and metrics."""
    shots = "" if num_fewshot is None else f"_{num_fewshot}shot"
    return shots + ("" if limit is None else f"_limit{limit}")


def evaluation_file(run: Run, step: int, name: str, num_fewshot: int | None, limit: int | None) -> Path:
    """Returns the file for the results of one name."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100].lstrip(".")
    known = plain if plain == name else f"{plain}.{sha256_bytes(name.encode())[:8]}"
    return run.evaluations / step_name(step) / f"{known}{suffix(num_fewshot, limit)}.json"


def evaluation_files(run: Run) -> list[Path]:
    """Returns the files of all results, the oldest step first."""
    found = [(step_in(file.parent.name), file) for file in run.evaluations.glob("step_*/[!.]*.json")]
    return [file for step, file in sorted((s, f) for s, f in found if s is not None)]


def read_evaluation(run: Run, file: Path) -> TaskEvaluation:
    """Returns what a file holds.

    Raises:
        PipelineError: It is damaged.
    """
    return read_checked(file, run.path, TASK_EVALUATION)


def evaluations(run: Run) -> list[TaskEvaluation]:
    """Returns the results of all tasks on all checkpoints, the oldest step first.

    Raises:
        PipelineError: A file is damaged.
    """
    return [read_evaluation(run, file) for file in evaluation_files(run)]
