"""The vocabulary of a site: one YAML file under slurm/sites says how a cluster wants its jobs.

`launch/job/batch_script.py` turns it into sbatch options, `launch/container/command.py` into Apptainer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.messages.foreign_keys import SITE_KEYS
from pipeline.config.section_base import ANY_TEXT, Count, Name, NonNegativeInt, Positive, Section, rule, wrong_value
from pipeline.config.yaml_tree import Vocabulary
from pipeline.errors import Problem
from pipeline.text_format import hidden_character


class Resources(Section):
    """Resources that a stage of one process requests from Slurm."""

    partition: str | None = None
    """Partition; without it, the cluster's default."""
    cpus_per_task: Count = 1
    """CPU cores of each process."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs per node; 0 computes on the CPU."""
    mem_gb: Positive | None = None
    """Memory per node in GiB; without it, the partition's default."""
    time_limit_min: Count = 60
    """Wall-clock limit of one attempt, in minutes; a stage that reaches it is requeued and resumes."""


class TrainResources(Resources):
    """Resources that training requests: nodes x tasks_per_node processes."""

    nodes: Count = 1
    """Number of nodes."""
    tasks_per_node: Count = 1
    """Processes per node: one per GPU."""

    @rule
    def _one_process_per_gpu(self) -> Iterator[Problem]:
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            one_each = f"one process per GPU, gpus_per_node = {self.gpus_per_node}"
            yield wrong_value("tasks_per_node", self.tasks_per_node, one_each)


class PrepareResources(Resources):
    """Resources that the prepare array requests; one task is one slice of the work."""

    slices: Count = 4
    """Number of tasks in the array."""
    max_parallel: Count = 64
    """Maximum number of tasks that run at the same time."""


class SiteContainer(Section):
    """How Apptainer runs on this cluster."""

    command: str = "apptainer"
    """Program: `apptainer`, `singularity`, or a path."""
    unsquash: bool = False
    """Unpack the image at every start: for nodes that have squashfuse but no access to /dev/fuse."""
    pid: bool = True
    """Use a separate process namespace, so that no process outlives the job."""
    gpu: Literal["auto", "nv", "rocm", "none"] = "auto"
    """`auto` looks for a GPU on the node; `nv` and `rocm` require one; `none` is for CPU clusters."""
    binds: tuple[str, ...] = ()
    """Further folders visible in every job, `HOST[:INSIDE[:ro]]`: drivers, a shared cache."""
    options: tuple[str, ...] = ()
    """Further options of `apptainer exec`, passed unchanged."""


class RequeuePolicy(Section):
    """What happens when a job ends before its work is done."""

    max_restarts: Count = 100
    """Maximum number of restarts of one job, for whatever reason."""
    same_step_failures: Count = 3
    """Consecutive failures without a new checkpoint (or slice) before the run is `failed`."""
    exclude_lost_nodes: bool = True
    """A retry avoids nodes that were lost or that failed preflight."""


class Site(Section):
    """One cluster, as its users see it."""

    name: Name
    """Name of the site in messages and provenance."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features, as sbatch takes them."""
    gpu_request: Literal["gpus_per_node", "gres"] = "gpus_per_node"
    """How GPUs are requested: `--gpus-per-node=N` or `--gres=gpu:N`."""
    gpu_type: str | None = None
    """GPU type in the request, for example `a100`."""
    prepare: PrepareResources = PrepareResources()
    train: TrainResources
    evaluate: Resources = Resources()
    signal_before_end_s: Annotated[int, Field(ge=10, le=65535)] | None = None
    """Seconds before the time limit at which Slurm sends the stop signal; without it, derived from measured times."""
    environment: dict[str, str] = Field(default={})
    """Environment variables of every job; they may be secrets, unlike what `setup` holds."""
    modules: tuple[str, ...] = ()
    """Modules that every job loads, for example `apptainer/1.3`."""
    setup: Annotated[tuple[str, ...], ANY_TEXT] = ()
    """Shell lines that the batch script runs on the first node before the job's own work."""
    scratch: str | None = None
    """Scratch folder for caches, node-local or shared, visible in the job."""
    extra_sbatch: dict[str, str | bool] = Field(default={})
    """Further sbatch options by name, without dashes: `licenses: scratch`; true for an option without a value."""
    container: SiteContainer = SiteContainer()
    requeue: RequeuePolicy = RequeuePolicy()
    accounting: bool = True
    """Whether sacct works here; if not, squeue, scontrol and the run folder suffice."""
    python: str | None = None
    """Python of the host that runs the job outside the image; without it, the one that submits."""

    @rule
    def _environment_names_are_free(self) -> Iterator[Problem]:
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                yield Problem(f"environment.{name}", "is not a valid name of a variable")
            if name in _OWN_VARIABLES:
                reason = "the launcher sets it, so that jobs run the code that was submitted"
                cure = "install further packages into the jobs' Python or into the image"
                yield Problem(f"environment.{name}", f"allowed: other names; {reason} ({cure})")

    @rule
    def _python_needs_no_shell(self) -> Iterator[Problem]:
        if self.python is not None and self.python.startswith("~"):
            yield wrong_value(
                "python", self.python, "an absolute path, or a name on the PATH; no shell expands ~ there"
            )

    @rule
    def _setup_is_lines_of_text(self) -> Iterator[Problem]:
        for index, line in enumerate(self.setup):
            hidden = hidden_character(re.sub(r"[\t\n]", " ", line))
            if hidden is not None:
                yield wrong_value(f"setup.{index}", line, f"shell lines without control characters, which {hidden} is")

    @rule
    def _extra_sbatch_contradicts_no_field(self) -> Iterator[Problem]:
        for name, value in self.extra_sbatch.items():
            owner = _DECIDED_BY.get(name.replace("_", "-"))  # submitit writes `cpus_per_task` as `--cpus-per-task`
            if owner is not None:
                yield wrong_value(f"extra_sbatch.{name}", value, f"nothing; it is decided by {owner}")
            elif value is False or name.startswith("-"):
                yield wrong_value(f"extra_sbatch.{name}", value, "a name without leading dashes, and a value or true")


SITE = Vocabulary(Site, "site", "slurm/sites/cpu.yaml", SITE_KEYS)

# A second value under `extra_sbatch` would contradict what the launcher decides itself.
_DECIDED_BY = {
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
# With these a job finds the code that was submitted.
_OWN_VARIABLES = ("PYTHONPATH", "PYTHONSAFEPATH")


def load_site(path: str | Path) -> Site:
    """Reads a site file.

    Raises:
        UsageError: The file cannot be read.
        ConfigError: Everything that is wrong with the file.
    """
    return parse_site(SITE.read(path), source=str(path))


def parse_site(text: str, source: str = "site") -> Site:
    """Does what `load_site` does with the text of a file; `source` names it in messages."""
    return SITE.parse(text, source)
