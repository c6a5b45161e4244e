"""The values of a sweep: lists on the command line, or the rows of a file; each becomes dotted overrides and a name."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.yaml_loader import MOST_BYTES, read_yaml
from pipeline.errors import UsageError
from pipeline.files import naming, read_bounded

_FILES = (".csv", ".yaml", ".yml")
_EXAMPLE = "optimizer.learning_rate=1e-3,3e-4"


@dataclass(frozen=True)
class Choice:
    """One value of a list, or one row of a file."""

    label: str
    """Its part of the name of a run."""
    values: dict[str, str]
    """YAML text by dotted key."""


def choices(sweep: str) -> list[Choice]:
    """Returns what one `--sweep` lists: `dotted.key=value,value,...`, or the rows of a CSV or YAML file.

    Raises:
        UsageError: It is malformed, or the file cannot be read.
    """
    if "=" not in sweep and Path(sweep).suffix in _FILES:
        return _rows(sweep)
    key, equals, text = sweep.partition("=")
    values = _split(text)
    if not key or not equals or "" in values:
        raise UsageError(
            f"--sweep {sweep}: allowed: dotted.key=value,value,..., for example {_EXAMPLE}, or a file of rows "
            f"({', '.join(_FILES)})"
        )
    if len(set(values)) < len(values):
        raise UsageError(f"--sweep {sweep}: names a value twice")
    return [Choice(_label(key, value), {key: value}) for value in values]


def _rows(file: str) -> list[Choice]:
    try:
        with naming(f"--sweep {file}", "cannot be read", error=UsageError):
            text = read_bounded(file, most=MOST_BYTES).decode("utf-8-sig")
        rows = _csv_rows(text) if file.endswith(".csv") else _yaml_rows(text)
    except (UnicodeDecodeError, csv.Error, yaml.YAMLError, ValueError) as error:
        raise UsageError(
            f"--sweep {file}: {error}; allowed: a CSV file whose first line holds dotted keys, or a YAML list of "
            "mappings from dotted keys to values; one row per run"
        ) from None
    if not rows:
        raise UsageError(f"--sweep {file}: holds no rows; one row per run")
    return [Choice(_row_label(row), {key: value for key, value in row.items() if key != "name"}) for row in rows]


def _csv_rows(text: str) -> list[dict[str, str]]:
    lines = [row for row in csv.reader(io.StringIO(text), strict=True) if any(cell.strip() for cell in row)]
    keys = [key.strip() for key in lines[0]] if lines else []
    _refuse_keys(keys)
    for number, cells in enumerate(lines[1:], 1):
        if len(cells) != len(keys):
            raise ValueError(f"row {number} has {len(cells)} cells, the first line {len(keys)}")
    # An empty cell leaves the value of the config.
    rows = [zip(keys, map(str.strip, cells), strict=True) for cells in lines[1:]]
    return [{key: cell for key, cell in row if cell} for row in rows]


def _yaml_rows(text: str) -> list[dict[str, str]]:
    tree = read_yaml(text)
    if not isinstance(tree, list) or not all(isinstance(row, dict) and row for row in tree):
        raise ValueError("is no list of mappings")
    for row in tree:
        _refuse_keys(list(row))
    return [{key: _text(key, value) for key, value in row.items()} for row in tree]


def _text(key: str, value: Any) -> str:
    return str(value) if key == "name" else json.dumps(value, ensure_ascii=False)


def _refuse_keys(keys: list[str]) -> None:
    wrong = next((key for key in keys if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key)), None)
    if wrong is not None:
        raise ValueError(f"{wrong[:60]!r} is not a dotted key")
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"the key {twice} is there twice")


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets, so that a value may be a list."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return [value.strip() for value in values]


def _row_label(row: dict[str, str]) -> str:
    if "name" in row:
        return _words(row["name"])
    return "-".join(_label(key, value) for key, value in row.items())


def _label(key: str, value: str) -> str:
    return f"{key.rpartition('.')[2]}-{_words(value)}"


def _words(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+_]+", "_", value).strip("_").replace("+", "")
