"""Sweeps: one config and lists of values become one experiment per combination."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.files import sha256_bytes
from pipeline.run.folder import Run, run_for


def experiments(config_file: str, overrides: Sequence[str], sweeps: Sequence[str], world_size: int) -> list[Config]:
    """Returns the configs of a sweep, each with its own name; a single one without a sweep.

    Several sweeps, each `dotted.key=value,value,...`, are combined; the overrides are those of every run.

    Raises:
        UsageError: A sweep is malformed, or its runs could not share one dataset.
        ConfigError: Everything that is wrong with the config.
    """
    base = load_config(config_file, overrides, world_size)
    if not sweeps:
        return [base]
    choices = [_choices(sweep) for sweep in sweeps]
    found = []
    for combination in itertools.product(*choices):
        name = "-".join([base.name, *(_label(key, value) for key, value in combination)])
        chosen = [f"{key}={value}" for key, value in combination]
        found.append(load_config(config_file, [*overrides, *chosen, f"name={name}"], world_size))
    _refuse_same_names(found, sweeps)
    _refuse_other_data(found, [key for key, _ in (c[0] for c in choices)])
    return found


def home_of(configs: list[Config]) -> Run:
    """Returns the folder for the files of the jobs: the run, or one that no other sweep of the config uses.

    A job reads its work there when it starts: of two sweeps in one folder only the second would be trained.
    """
    if len(configs) == 1:
        return run_for(configs[0])
    names = sorted(config.name for config in configs)
    mark = sha256_bytes("\n".join(names).encode())[:8]
    return Run(Path(configs[0].runs_dir) / f"{_base(names)}-sweep-{mark}")


def _base(names: list[str]) -> str:
    """Returns the common part of the sorted names of a sweep's runs: the config's own name."""
    first, last = names[0], names[-1]
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:common].rpartition("-")[0].rpartition("-")[0] or first[:common]


def _choices(sweep: str) -> list[tuple[str, str]]:
    key, equals, text = sweep.partition("=")
    values = _split(text)
    if not key or not equals or "" in values:
        raise UsageError(
            f"--sweep {sweep}: allowed: dotted.key=value,value,..., for example optimizer.learning_rate=1e-3,3e-4"
        )
    if len(set(values)) < len(values):
        raise UsageError(f"--sweep {sweep}: names a value twice")
    return [(key, value) for value in values]


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


def _label(key: str, value: str) -> str:
    words = re.sub(r"[^A-Za-z0-9.+_]+", "_", value).strip("_").replace("+", "")
    return f"{key.rpartition('.')[2]}-{words}"


def _refuse_same_names(configs: list[Config], sweeps: Sequence[str]) -> None:
    names = [config.name for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"--sweep {' --sweep '.join(sweeps)}: two of its runs would both be called {twice}, because "
            "only letters, digits, dots and underscores of a value enter the name; submit one of them separately, with "
            "its own `name`"
        )


def _refuse_other_data(configs: list[Config], keys: list[str]) -> None:
    first = configs[0]
    for config in configs:
        if (config.data, config.tokenizer, config.model.vocab_size) != (
            first.data, first.tokenizer, first.model.vocab_size,
        ):  # fmt: skip
            raise UsageError(
                f"--sweep: {', '.join(keys)} would need other tokens for each run, and a sweep shares one dataset; "
                "submit these runs one by one, each with its own data.path"
            )
