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
    "cpus-per-gpu": "cpus_per_task of each stage",
    "cpus-per-task": "cpus_per_task of each stage",
    "dependency": "the launcher",
    "error": "the launcher: logs are in the run folder",
    "gpus": "gpus_per_node of each stage",
    "gpus-per-node": "gpus_per_node of each stage",
    "gpus-per-socket": "gpus_per_node of each stage",
    "gpus-per-task": "gpus_per_node of each stage",
    "gres": "gpus_per_node of each stage and gpu_request",
    "job-name": "the launcher: jobs are called RUN-STAGE",
    "kill-on-invalid-dep": "the launcher",
    "mem": "mem_gb of each stage",
    "mem-per-cpu": "mem_gb of each stage",
    "mem-per-gpu": "mem_gb of each stage",
    "no-requeue": "requeue.max_restarts",
    "nodes": "train.nodes",
    "ntasks": "train.nodes and train.tasks_per_node",
    "ntasks-per-gpu": "train.tasks_per_node",
    "ntasks-per-node": "train.tasks_per_node",
    "open-mode": "the launcher",
    "output": "the launcher: logs are in the run folder",
    "parsable": "the launcher, which reads what sbatch prints",
    "partition": "partition of each stage",
    "qos": "qos",
    "quiet": "the launcher, which reads what sbatch prints",
    "requeue": "requeue.max_restarts",
    "signal": "signal_before_end_s",
    "test-only": "`pipeline submit --dry-run`",
    "time": "time_limit_min of each stage",
    "wait": "the launcher",
    "wrap": "the launcher",
}
# By which a job finds the code that was submitted, and not another.
_OWN_VARIABLES = ("PYTHONPATH", "PYTHONSAFEPATH")


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
        if name in _OWN_VARIABLES:
            given = (
                "allowed: other names; the launcher sets it, so that jobs run the code that was submitted "
                "(install further packages for the jobs' Python, or into the image)"
            )
            problems.append(Problem(f"environment.{name}", given))
    for name, value in site.extra_sbatch.items():
        option = name.replace("_", "-")  # submitit writes `cpus_per_task` as `--cpus-per-task`
        if option in _OWN_OPTIONS:
            given = f"given {shown(value)}, allowed: nothing; it is decided by {_OWN_OPTIONS[option]}"
            problems.append(Problem(f"extra_sbatch.{name}", given))
        elif value is False or name.startswith("-"):
            problems.append(
                Problem(f"extra_sbatch.{name}", "allowed: a name without dashes before it, and a value or true")
            )
    return problems
