"""The vocabulary of a site: one YAML file under slurm/sites says how a cluster wants its jobs.

Reading and checking the YAML is `site_load.py`; what becomes of it is `job.py` (Slurm) and `container.py` (Apptainer).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.sections import Count, Name, NonNegativeInt, Positive, Section
from pipeline.config.yaml_tree import Vocabulary, shown
from pipeline.errors import Problem


class Resources(Section):
    """What a stage of one process asks Slurm for."""

    partition: str | None = None
    """Partition; the cluster's default without it."""
    cpus_per_task: Count = 1
    """CPU cores of each process."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs a node; 0 computes on the CPU."""
    mem_gb: Positive | None = None
    """Memory a node, in GiB; the partition's default without it."""
    time_limit_min: Count = 60
    """Wall-clock limit of one attempt, in minutes; a stage that meets it is requeued and goes on."""


class TrainResources(Resources):
    """What training asks for: nodes x tasks_per_node processes."""

    nodes: Count = 1
    """Nodes."""
    tasks_per_node: Count = 1
    """Processes a node: one a GPU."""


class PrepareResources(Resources):
    """What the prepare array asks for; one task is one slice of the work."""

    slices: Count = 4
    """Tasks of the array."""
    max_parallel: Count = 64
    """Tasks that may run at the same time."""


class SiteContainer(Section):
    """How Apptainer is run here."""

    command: str = "apptainer"
    """The program: `apptainer`, `singularity`, or a path."""
    unsquash: bool = False
    """Unpack the image at every start: for nodes where squashfuse is there and /dev/fuse is closed."""
    pid: bool = True
    """A process namespace of its own, so that nothing outlives the job."""
    gpu: Literal["auto", "nv", "rocm", "none"] = "auto"
    """`auto` looks at the node; `nv` and `rocm` insist; `none` for CPU clusters."""
    binds: tuple[str, ...] = ()
    """Further folders every job sees, `HOST[:INSIDE[:ro]]`: drivers, a shared cache."""
    options: tuple[str, ...] = ()
    """Further options of `apptainer exec`, as they are."""


class RequeuePolicy(Section):
    """What happens when a job ends before its work is done."""

    max_restarts: Count = 100
    """Restarts of one job, for whatever reason, before it is left alone."""
    same_step_failures: Count = 3
    """Failures without a new checkpoint (or slice) between them before the run is `failed`."""
    exclude_lost_nodes: bool = True
    """A retry does not go to a node that was lost, or that preflight found bad."""


class Site(Section):
    """One cluster, as its users see it."""

    name: Name
    """Name of the site, in messages and in provenance."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, as sbatch takes them."""
    gpu_request: Literal["gpus_per_node", "gres"] = "gpus_per_node"
    """How GPUs are asked for: `--gpus-per-node=N` or `--gres=gpu:N`."""
    gpu_type: str | None = None
    """Type in the GPU request, `a100` say."""
    prepare: PrepareResources = PrepareResources()
    train: TrainResources
    evaluate: Resources = Resources()
    signal_before_end_s: Annotated[int, Field(ge=10)] | None = None
    """Seconds before the time limit at which Slurm sends the signal to stop; derived from measured times without it."""
    environment: dict[str, str] = Field(default={})
    """Variables every job gets."""
    modules: tuple[str, ...] = ()
    """`module load` lines."""
    setup: tuple[str, ...] = ()
    """Shell lines before the job's own work, in the batch script on the first node."""
    scratch: str | None = None
    """Node-local or parallel scratch folder for caches, visible in the job."""
    extra_sbatch: dict[str, str | bool] = Field(default={})
    """Further sbatch options by name, without dashes: `licenses: scratch`; true for one without a value."""
    container: SiteContainer = SiteContainer()
    requeue: RequeuePolicy = RequeuePolicy()
    accounting: bool = True
    """Whether sacct answers here; without it squeue, scontrol and the run folder are enough."""
    python: str | None = None
    """Python of the host that runs the job's outer part; the one that submits without it."""


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
