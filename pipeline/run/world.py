"""Reads this process's rank and the world size from the variables of torchrun or srun."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

# Unix seconds at which the job ends; the launcher sets it, and training stops in time.
DEADLINE_VARIABLE = "PIPELINE_DEADLINE"

# Number of this attempt of the job; the launcher sets it, because Slurm counts only those that went through the queue.
ATTEMPT_VARIABLE = "PIPELINE_ATTEMPT"

# GPUs that the job has on each node, if it requested any; the launcher sets it, and training refuses to do without.
GPUS_VARIABLE = "PIPELINE_GPUS_PER_NODE"

# Names a start of all ranks; the launcher sets it, because inside an image the variables of the step may be missing.
MEETING_VARIABLE = "PIPELINE_MEETING"

# torchrun sets it, and keeps MASTER_PORT for itself.
AGENT_VARIABLE = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True)
class World:
    """The place of one process among those that train together."""

    rank: int = 0
    """Rank of this process."""
    local_rank: int = 0
    """Its rank on its node: the GPU it uses."""
    size: int = 1
    """Number of processes."""
    master_addr: str = "127.0.0.1"
    """The node of rank 0."""
    master_port: int = 0
    """Where rank 0 listens; 0 lets the system choose."""
    meeting: str = ""
    """Names this start, the same on all ranks: they find rank 0 through a file of that name."""

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    def export(self, environ: dict[str, str]) -> None:
        """Sets the variables that DeepSpeed reads, and what the other end needs to meet the other ranks."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_addr,
        )
        if self.master_port:
            environ["MASTER_PORT"] = str(self.master_port)
        if self.meeting:
            environ[MEETING_VARIABLE] = self.meeting


def world_from_environment(environ: Mapping[str, str] = os.environ) -> World:
    """Returns the place from RANK, WORLD_SIZE and LOCAL_RANK, else from an srun step, else of a lone process.

    Raises:
        UsageError: The variables are incomplete or not numbers.
    """
    if any(name in environ for name in _TORCHRUN):
        return _from_torchrun(environ)
    if "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        return world_from_srun(environ)
    return World()


def _from_torchrun(environ: Mapping[str, str]) -> World:
    missing = [name for name in _TORCHRUN if name not in environ]
    if missing:
        raise UsageError(f"the environment lacks {', '.join(missing)}; set all of {', '.join(_TORCHRUN)} or none")
    rank, size, local_rank = (_number(environ, name) for name in _TORCHRUN)
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank} is not below WORLD_SIZE={size}")
    if local_rank < 0:
        raise UsageError(f"LOCAL_RANK={local_rank} is below 0")
    named = environ.get(MEETING_VARIABLE, "")
    if size > 1 and not named and ("MASTER_ADDR" not in environ or "MASTER_PORT" not in environ):
        raise UsageError("WORLD_SIZE above 1 needs MASTER_ADDR and MASTER_PORT in the environment")
    port = _port(environ) if "MASTER_PORT" in environ else 0
    address = environ.get("MASTER_ADDR", "127.0.0.1")
    if size > 1 and not named:
        start = (address, port, environ.get(AGENT_VARIABLE), environ.get("TORCHELASTIC_RESTART_COUNT"))
        named = hashlib.sha256(repr(start).encode()).hexdigest()[:16]
    return World(rank, local_rank, size, address, 0 if AGENT_VARIABLE in environ else port, _meeting(named))


def world_from_srun(environ: Mapping[str, str]) -> World:
    """Returns the place of a task in an srun step, whatever RANK and the like say.

    Raises:
        UsageError: The variables are incomplete or not numbers.
    """
    rank, size, local_rank = (
        _number(environ, name) for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    )
    if not 0 <= rank < size or local_rank < 0:
        raise UsageError(
            f"SLURM_PROCID={rank} and SLURM_LOCALID={local_rank} are no task of a step of "
            f"SLURM_STEP_NUM_TASKS={size}; start the ranks with srun"
        )
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    # The restart too: ranks of the previous attempt may still live on a node that Slurm gave up too early.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, attempt = (_number({"SLURM_RESTART_COUNT": "0", **environ}, name) for name in names)
    port = _port(environ) if "MASTER_PORT" in environ else 0
    address = environ.get("MASTER_ADDR") or first_host(nodes)
    return World(rank, local_rank, size, address, port, f"{job}.{step}.{attempt}")


def attempt_number(environ: Mapping[str, str]) -> int:
    """Returns how often the tasks of this job have started before; 0 outside a job."""
    name = ATTEMPT_VARIABLE if ATTEMPT_VARIABLE in environ else "SLURM_RESTART_COUNT"
    return _number({name: "0", **environ}, name)


def first_host(nodes: str) -> str:
    """Returns the first name of a Slurm host list: `gpu[003-007,012],login` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if match is None:
        raise UsageError(f"the host list {nodes!r} of the Slurm job cannot be parsed; set MASTER_ADDR")
    return match[1] + (match[2] or "") + match[3]


def _port(environ: Mapping[str, str]) -> int:
    port = _number(environ, "MASTER_PORT")
    if not 0 <= port < 1 << 16:  # 0 for a lone process, whose rank 0 listens nowhere
        raise UsageError(f"MASTER_PORT={port} is no port; allowed: 1 to 65535")
    return port


def _meeting(name: str) -> str:
    if not re.fullmatch(r"[\w.-]{0,64}", name, re.ASCII):
        raise UsageError(f"{MEETING_VARIABLE}={name[:60]!r} is no name of a start; unset it")
    return name


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError as error:
        raise UsageError(f"the environment lacks {name}") from error
    except ValueError as error:
        raise UsageError(f"{name}={environ[name][:60]!r} is not a number") from error
