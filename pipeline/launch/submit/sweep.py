"""Sweeps: one config and lists or rows of values become one experiment per combination."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.errors import ConfigError, Problem, UsageError
from pipeline.files import sha256_bytes
from pipeline.launch.submit.sweep_values import Choice, choices
from pipeline.run.folder import Run, run_for

_MOST_PROBLEMS = 50


@dataclass(frozen=True)
class Experiments:
    """The experiments of a submission, at least one."""

    configs: list[Config]
    values: list[dict[str, str]]
    """What each config takes from the sweep: YAML text by dotted key; empty without a sweep."""
    home: Run
    """The folder for the files of the jobs: the run, or one that no other sweep of the config uses."""


def experiments(config_file: str, overrides: Sequence[str], sweeps: Sequence[str], world_size: int) -> Experiments:
    """Returns the experiments of a sweep, each with its own name; a single one without a sweep.

    Several sweeps, each `dotted.key=value,value,...` or a file of rows, are combined; the overrides are those of every
    run.

    Raises:
        UsageError: A sweep is malformed, or its runs could not share one dataset.
        ConfigError: Everything that is wrong with the config, in any of the runs.
    """
    base = load_config(config_file, overrides, world_size)
    if not sweeps:
        return Experiments([base], [{}], run_for(base))
    configs, found = [], []
    problems: dict[Problem, None] = {}
    given = list(map(choices, sweeps))
    _refuse_keys(given)
    for combination in itertools.product(*given):
        name = "-".join([base.name, *(choice.label for choice in combination if choice.label)])
        values = {key: value for choice in combination for key, value in choice.values.items()}
        chosen = [f"{key}={value}" for key, value in values.items()]
        try:
            configs.append(load_config(config_file, [*overrides, *chosen, f"name={name}"], world_size))
        except ConfigError as error:  # one row must not hide what is wrong with the rows behind it
            problems |= dict.fromkeys(Problem(p.path, f"{p.message} (run {name})") for p in error.problems)
        found.append(values)
    if problems:
        raise ConfigError(config_file, list(problems)[:_MOST_PROBLEMS])
    _refuse_same_names(configs, sweeps)
    _refuse_other_data(configs, list(dict.fromkeys(key for values in found for key in values)))
    return Experiments(configs, found, _home(base, configs))


def _refuse_keys(given: list[list[Choice]]) -> None:
    keys = [key for swept in given for key in {key: None for choice in swept for key in choice.values}]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UsageError(f"--sweep: {twice} is given twice; name all of its values at once: {twice}=VALUE,VALUE,...")
    if "runs_dir" in keys:
        raise UsageError("--sweep: the runs of a sweep are in one folder; set runs_dir without --sweep")


def _home(base: Config, configs: list[Config]) -> Run:
    # A job reads its work there when it starts: of two sweeps in one folder only the second would be trained.
    if len(configs) == 1:
        return run_for(configs[0])
    mark = sha256_bytes("\n".join(sorted(config.name for config in configs)).encode())[:8]
    return Run(Path(base.runs_dir) / f"{base.name}-sweep-{mark}")


def _refuse_same_names(configs: list[Config], sweeps: Sequence[str]) -> None:
    names = [config.name for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(
            f"--sweep {' --sweep '.join(sweeps)}: two of its runs would both be called {twice}, because "
            "only letters, digits, dots and underscores of a value enter the name; give the rows of a file a `name`, "
            "or submit one of the runs separately, with its own `name`"
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
