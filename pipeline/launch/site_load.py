"""A site file -> a validated `Site`, or every problem at once."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import Problem
from pipeline.launch.site import Site
from pipeline.section_load import Vocabulary, shown

SITE = Vocabulary(Site, "site", "slurm/sites/cpu.yaml")

# What the launcher decides itself: a second value under `extra_sbatch` would contradict it.
_OWN_OPTIONS = {
    "account": "account",
    "array": "prepare.slices and prepare.max_parallel",
    "chdir": "the launcher: jobs run where they were submitted",
    "constraint": "constraint",
    "cpus-per-task": "cpus_per_task of each stage",
    "dependency": "the launcher",
    "error": "the launcher: logs are in the run folder",
    "gpus-per-node": "gpus_per_node of each stage",
    "gres": "gpus_per_node of each stage and gpu_request",
    "job-name": "the launcher: jobs are called RUN-STAGE",
    "mem": "mem_gb of each stage",
    "no-requeue": "requeue.max_restarts",
    "nodes": "train.nodes",
    "ntasks-per-node": "train.tasks_per_node",
    "open-mode": "the launcher",
    "output": "the launcher: logs are in the run folder",
    "partition": "partition of each stage",
    "qos": "qos",
    "requeue": "requeue.max_restarts",
    "signal": "signal_before_end_s",
    "time": "time_limit_min of each stage",
}


def load_site(path: str | Path) -> Site:
    """Reads a site file.

    Raises:
        UsageError: The file cannot be read.
        ConfigError: Everything that is wrong with it.
    """
    return parse_site(SITE.read(path), source=str(path))


def parse_site(text: str, source: str = "site") -> Site:
    """Like `load_site`, from the text of the file; `source` names it in messages."""
    site, problems = SITE.parse(text, (), source)
    if site is not None:
        flawed = {p.path for p in problems}
        problems += [p for p in _cross_checks(site) if p.path not in flawed]
    if problems:
        raise SITE.refusal(source, problems)
    assert site is not None
    return site


def _cross_checks(site: Site) -> list[Problem]:
    problems = []
    train = site.train
    if train.gpus_per_node and train.tasks_per_node != train.gpus_per_node:
        problems.append(
            Problem(
                "train.tasks_per_node",
                f"given {train.tasks_per_node}, allowed: one process a GPU, gpus_per_node = {train.gpus_per_node}",
            )
        )
    for name in site.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(Problem(f"environment.{name}", "is no name of a variable"))
    for name, value in site.extra_sbatch.items():
        if name in _OWN_OPTIONS:
            given = f"given {shown(value)}, allowed: nothing; it is decided by {_OWN_OPTIONS[name]}"
            problems.append(Problem(f"extra_sbatch.{name}", given))
        elif value is False or name.startswith("-"):
            problems.append(
                Problem(f"extra_sbatch.{name}", "allowed: a name without dashes before it, and a value or true")
            )
    return problems
