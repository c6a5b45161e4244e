"""Runs that belong together and are beside each other: those of a sweep, and the decays of a stable run.

`sweep.json` in a sweep's folder, which stands for its runs, holds their names and swept values;
`launch/branches.json` in a stable run names the runs that begin at its checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic takes that of typing from Python 3.12 on

from pipeline.errors import PipelineError, UsageError, refuse
from pipeline.files import write_json
from pipeline.run.folder import RUNS_DIR, Run, open_run
from pipeline.run.records import read_checked


class _SweepRun(TypedDict):
    name: Annotated[str, Field(pattern=r"^[^/.][^/]*$", max_length=255)]
    values: dict[str, str]


class _Sweep(TypedDict):
    runs: list[_SweepRun]


_SWEEP: TypeAdapter[_Sweep] = TypeAdapter(_Sweep)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    run: Run
    values: dict[str, str]
    """Its swept values: YAML text by dotted key."""


def write_sweep(home: Run, runs: Sequence[SweepRun]) -> None:
    """Records which runs a sweep's folder stands for."""
    write_json(home.sweep_file, {"runs": [{"name": one.run.name, "values": one.values} for one in runs]})


def read_sweep(folder: str | Path) -> list[SweepRun]:
    """Returns the runs of a sweep's folder; empty for any other folder.

    Raises:
        PipelineError: `sweep.json` is damaged.
    """
    home = Run(Path(folder))
    if not home.sweep_file.is_file():
        return []
    runs = read_checked(home.sweep_file, home.path, _SWEEP)["runs"]
    return [SweepRun(Run(home.path.parent / one["name"]), one["values"]) for one in runs]


class _Branch(TypedDict):
    step: Annotated[int, Field(ge=1, le=1 << 53)]
    name: Annotated[str, Field(pattern=r"^[^/.][^/]*$", max_length=255)]


class _Branches(TypedDict):
    branches: list[_Branch]


_BRANCHES: TypeAdapter[_Branches] = TypeAdapter(_Branches)


@dataclass(frozen=True)
class Branch:
    """A run that decays the learning rate from a checkpoint of a stable run, which is beside it."""

    step: int
    """The step of the checkpoint."""
    run: Run


def read_branches(stable: Run) -> list[Branch]:
    """Returns the decays of a run by their steps; empty for any other run.

    Raises:
        PipelineError: The file is damaged.
    """
    if not stable.branches_file.exists():
        return []
    found = read_checked(stable.branches_file, stable.path, _BRANCHES)["branches"]
    named = {one["name"]: Branch(one["step"], Run(stable.path.parent / one["name"])) for one in found}
    return sorted(named.values(), key=lambda branch: branch.step)


def add_branches(stable: Run, new: Sequence[Branch]) -> None:
    """Records decays of a run, besides those that it has."""
    kept = {branch.run.name: branch.step for branch in [*read_branches(stable), *new]}
    write_json(stable.branches_file, {"branches": [{"step": step, "name": name} for name, step in kept.items()]})


def found_runs(paths: Sequence[str]) -> tuple[list[Run], list[PipelineError]]:
    """Returns the runs at these places, each once, and a problem for each place where there is none.

    A place is a run folder, a sweep's folder, which also stands for the decays of its runs, or a folder of run folders.

    Raises:
        PipelineError: There is no run at any of them.
    """
    found: dict[Path, Run] = {}
    problems: list[PipelineError] = []
    for path in paths:
        try:
            runs = _runs_at(path)
        except PipelineError as error:
            problems.append(error)
            continue
        for run in runs:
            found.setdefault(run.path.resolve(), run)
    if not found:
        refuse(problems or [UsageError("there is no run")])
    return list(found.values()), problems


def runs_here() -> list[Run]:
    """Returns the runs of the default folder.

    Raises:
        UsageError: There are none yet.
    """
    found = _runs_inside(RUNS_DIR)
    if not found:
        raise UsageError(
            f"there are no runs here yet (in {RUNS_DIR}/): `pipeline train CONFIG` begins one; or name a run, "
            "or a folder of runs"
        )
    return found


def _runs_at(path: str) -> list[Run]:
    if Run(Path(path)).config_file.is_file():
        return [Run(Path(path))]
    if swept := read_sweep(path):
        runs = [run for one in swept for run in (one.run, *(branch.run for branch in read_branches(one.run)))]
        there = [run for run in runs if run.config_file.is_file()]
        if not there:
            raise UsageError(f"{path}: the folders of its runs are gone: {swept[0].run.path} ...")
        return there
    return _runs_inside(path) or [open_run(path)]


def _runs_inside(path: str) -> list[Run]:
    inside = sorted(Path(path).glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)
    return [Run(p.parent) for p in inside]
