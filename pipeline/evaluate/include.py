"""Checks a folder of tasks that the user names: its YAML is data, and nothing of it is executed.

The harness would import functions that YAML names (`!function`), unpickle, or run a script of a metric. A template is a
program too; `tasks.py` renders it in a sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.yaml_loader import MOST_BYTES, read_yaml
from pipeline.errors import UsageError, listing
from pipeline.files import read_bounded
from pipeline.text_format import printable

_CODE = {
    "class": "names a class to import",
    "custom_dataset": "names a function that makes the data",
    "hf_evaluate": "fetches a metric's script and runs it",
    "process_docs": "names a function; change the data instead",
    "process_results": "names a function; use the harness's metrics",
    "trust_remote_code": "runs code that comes with data",
    "unsafe_code": "runs the code that the model writes",
    "use_prompt": "loads templates from elsewhere",
}
_FORMATS = ("arrow", "csv", "json", "parquet", "text")
_CURE = (
    "Only text, templates and the harness's own metrics and filters are allowed here; prepare the data so that they "
    "are enough (docs/evaluation.md)."
)
_MOST_FILES = 10_000


def check_include_path(folder: Path, metrics: frozenset[str], builders: frozenset[str]) -> None:
    """Refuses a folder of tasks that holds or names code.

    Args:
        folder: Searched for `*.yaml` as deeply as the harness does.
        metrics: The harness's own metrics: any other name would be looked up on the Hub.
        builders: Names that `dataset_path` cannot have for a data set: they read a file's format.

    Raises:
        UsageError: The folder is missing, or a file cannot be read or is refused; every file is named.
    """
    if not folder.is_dir():
        raise UsageError(f"--include-path {folder}: is not a folder")
    found = sorted(folder.glob("**/*.yaml"))
    if not found or len(found) > _MOST_FILES:
        raise UsageError(f"--include-path {folder}: holds {len(found) or 'no'} *.yaml")
    harness = _harness_tasks()
    seen: set[Path] = set()
    problems = []
    while found:
        file = found.pop(0).resolve()
        if file in seen or harness in file.parents:  # installed code may be code
            continue
        seen.add(file)
        try:
            if not file.is_relative_to(folder.resolve()):
                raise ValueError("is outside the folder")
            tree = read_yaml(read_bounded(file, folder, MOST_BYTES).decode())
            problems += [f"{printable(file)}: {problem}" for problem in _problems(tree, metrics, builders)]
            found += [file.parent / name for name in _included(tree)]
        except yaml.MarkedYAMLError as error:
            line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
            problems.append(f"{printable(file)}: {printable(error.problem)}{line}")
        except (OSError, ValueError, yaml.YAMLError) as error:
            problems.append(f"{printable(file)}: {printable(error)}")
    if problems:
        raise UsageError(listing(f"--include-path {folder}: these tasks are refused:", problems, _CURE))


def _harness_tasks() -> Path:
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.resolve() / "tasks"


def _included(tree: Any) -> list[str]:
    given = tree.get("include", []) if isinstance(tree, dict) else []
    return [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]


def _problems(tree: Any, metrics: frozenset[str], builders: frozenset[str]) -> Iterator[str]:
    for key, value in _pairs(tree):
        if key in _CODE and value not in (None, False):
            yield f"`{key}` {_CODE[key]}"
        elif key == "metric" and value not in metrics:
            yield f"metric {str(value)[:60]!r} is none of the harness's own"
        elif key == "dataset_path" and value in builders and value not in _FORMATS:
            yield f"dataset_path {value!r}: of the file formats, {', '.join(_FORMATS)} are allowed"


def _pairs(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key with its value, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key, value
            yield from _pairs(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from _pairs(item)
