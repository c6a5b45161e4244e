"""Finds tasks by their names, and loads them with their data."""

from __future__ import annotations

import json
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.utils import handle_non_serializable, hash_string

from pipeline.errors import DataError, PipelineError, UsageError, listing
from pipeline.evaluate.include import check_include_path
from pipeline.files import sha256_bytes
from pipeline.run.evaluations import data_cache
from pipeline.text_format import printable

# The harness's own: other seeds would draw other examples for few-shot prompts.
_PYTHON_SEED, _SEED = 0, 1234


@dataclass
class TaskSet:
    """What one name stands for: a task, the tasks of a tag, or a group with its tasks and groups."""

    name: str
    tasks: dict[str, Task]
    groups: dict[str, Group]


@dataclass(frozen=True)
class Asked:
    """Which tasks are evaluated, and how."""

    names: tuple[str, ...]
    limit: int | None = None
    """Documents of each task; None for all."""
    num_fewshot: int | None = None
    """Examples before each document; None for as many as the task says."""
    include_path: Path | None = None
    """A folder of further tasks."""


def load_task_sets(asked: Asked, *, fetching: bool = False) -> list[TaskSet]:
    """Returns the tasks with their data, in the order of their names.

    Args:
        asked: The tasks.
        fetching: Whether the harness was started with the network.

    Raises:
        UsageError: Names are unknown or given twice, or `include_path` is refused.
        DataError: Data is not in the cache, cannot be fetched, or is not what a task expects.
    """
    manager = _manager(asked)
    found: list[TaskSet] = []
    problems: list[str] = []
    missing: list[str] = []
    for name in asked.names:
        try:
            loaded = manager.load([name])
        except PipelineError:
            raise
        except Exception as error:  # the harness, its tasks and the data raise anything
            if _is_missing(error):
                missing.append(f"{name}: {_shortened(error)}")
            else:
                problems.append(f"{name}: {type(error).__name__}: {_shortened(error)}")
        else:
            found.append(TaskSet(name, loaded["tasks"], loaded.get("groups", {})))
    if problems:
        raise DataError(listing("these tasks cannot be loaded:", problems))
    if missing and fetching:
        raise DataError(listing("the data of these tasks cannot be fetched:", missing, "Is there a network here?"))
    if missing:
        more = f" --include-path {shlex.quote(str(asked.include_path))}" if asked.include_path else ""
        cure = f"Where there is a network, run once: pipeline evaluate --fetch --tasks {','.join(asked.names)}{more}"
        raise DataError(listing(f"the data of these tasks is not in {data_cache()}:", missing, cure))
    _refuse_twice(found)
    for chosen in found:
        for task in chosen.tasks.values():
            _prepare(task, asked)
    return found


def seed_draws(sets: Sequence[TaskSet]) -> None:
    """Resets every source of randomness, so that each evaluation draws the same examples."""
    random.seed(_PYTHON_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
    for chosen in sets:
        for task in chosen.tasks.values():
            task.set_fewshot_seed(seed=_SEED)


def build_requests(name: str, task: Task, limit: int | None) -> None:
    """Makes a task's prompts and draws its examples.

    Raises:
        DataError: A template fails on a document, or there are fewer examples than asked for.
    """
    try:
        task.build_all_requests(limit=limit, rank=0, world_size=1)
    except PipelineError:
        raise
    except Exception as error:  # the harness, its tasks and their templates raise anything
        raise DataError(
            f"task {name}: its prompts cannot be made, {task.get_config('num_fewshot')}-shot "
            f"({type(error).__name__}: {_shortened(error)}); correct the task, or ask for fewer examples"
        ) from error


def task_hash(task: Task, limit: int | None) -> str:
    """Returns the digest of a task's documents, prompts and targets, as the harness records it in its own results.

    Its requests are built.
    """
    first: dict[Any, Any] = {}
    for instance in task.instances:
        if instance.doc_id not in first or instance.idx < first[instance.doc_id].idx:
            first[instance.doc_id] = instance
    parts = []
    for number, doc in task.doc_iterator(rank=0, limit=limit, world_size=1):
        text = json.dumps(first[number].doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        parts += [text, str(first[number].arguments[0]), str(task.doc_to_target(doc))]
    return hash_string("".join(map(hash_string, parts)) * len(task._filters))


def definition(chosen: TaskSet) -> str:
    """Returns the digest of what tasks and groups say: choices, metrics, settings of generation, filters, weights."""
    tasks = {name: task.dump_config() for name, task in chosen.tasks.items()}
    groups = {name: (group.child_names, group.aggregate_metric_list) for name, group in chosen.groups.items()}
    # A function whose source cannot be found is shown with its address.
    return sha256_bytes(re.sub(r" at 0x[0-9a-f]+", "", repr((tasks, groups))).encode())


def _manager(asked: Asked) -> TaskManager:
    """Returns the index of the tasks; that of the harness's own takes seconds, and is left out where it is not needed.

    Raises:
        UsageError: A name is unknown, or `include_path` is refused.
    """
    include = None
    if asked.include_path is not None:
        check_include_path(asked.include_path, frozenset(_metrics()), frozenset(_builders()))
        include = str(asked.include_path)
        own = TaskManager(include_path=include, include_defaults=False)
        if all(name in own.task_index and own.task_index[name].kind is Kind.TASK for name in asked.names):
            return own
    manager = TaskManager(include_path=include)
    unknown = [name for name in asked.names if name not in manager.task_index]
    if unknown:
        hints = [_hint(name, manager.all_tasks) for name in unknown]
        raise UsageError(listing("--tasks: no such task:", hints, "`lm-eval ls tasks` lists all of them."))
    return manager


def _hint(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.6)
    return printable(name)[:80] + (f": did you mean {' or '.join(near)}?" if near else "")


def _metrics() -> list[str]:
    import lm_eval.api.metrics  # noqa: F401  # registers them

    return list(metric_registry.keys())


def _builders() -> list[str]:
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return list(_PACKAGED_DATASETS_MODULES)


def _refuse_twice(sets: Sequence[TaskSet]) -> None:
    owner: dict[str, str] = {}
    for chosen in sets:
        for name in chosen.tasks:
            if name in owner:
                raise UsageError(f"--tasks: {name} is part of {owner[name]} and of {chosen.name}; name one of them")
            owner[name] = chosen.name


def _prepare(task: Task, asked: Asked) -> None:
    """Sets the number of examples as the harness's command does: a task that says 0 keeps it."""
    own = task.get_config("num_fewshot")
    if asked.num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked.num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    for flag, why in (("MULTIMODAL", "needs images or sound"), ("UNSAFE_CODE", "runs the code that the model writes")):
        if getattr(task, flag, False):
            raise UsageError(f"--tasks: {task.task_name} {why}, which is not supported")


def _is_missing(error: BaseException) -> bool:
    """Whether data is neither in the cache nor to be had: the libraries raise what they like, from several causes."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, FileNotFoundError) and not isinstance(error, DatasetNotFoundError):
        return False  # a file that the task itself names
    known = (ConnectionError, DatasetNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return isinstance(error, known) or (error.__cause__ is not None and _is_missing(error.__cause__))


def _shortened(error: BaseException) -> str:
    return printable(" ".join(str(error).split())[:300])
