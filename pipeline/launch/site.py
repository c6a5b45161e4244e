"""The vocabulary of a site: one YAML file under slurm/sites says how a cluster wants its jobs.

Reading and checking the YAML is `site_load.py`; what becomes of it is `job.py` (Slurm) and `container.py` (Apptainer).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import Count, Name, NonNegativeInt, Positive, Section


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
