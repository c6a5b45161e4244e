"""Reads this process's rank and the world size from the variables of torchrun or srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.errors import UsageError

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")

# Unix seconds at which the job ends; the launcher sets it, and training stops in time.
DEADLINE_VARIABLE = "PIPELINE_DEADLINE"


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
    """Where rank 0 listens."""
    master_port: int = 0
    """Its port."""

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0."""
        return self.rank == 0

    def export(self, environ: dict[str, str]) -> None:
        """Sets the variables that torch.distributed and DeepSpeed read."""
        environ.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.size),
            LOCAL_RANK=str(self.local_rank),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


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
    if size > 1 and ("MASTER_ADDR" not in environ or "MASTER_PORT" not in environ):
        raise UsageError("WORLD_SIZE above 1 needs MASTER_ADDR and MASTER_PORT in the environment")
    port = _port(environ) if "MASTER_PORT" in environ else 0
    return World(rank, local_rank, size, environ.get("MASTER_ADDR", "127.0.0.1"), port)


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
    # Derived from the job, so that all ranks agree without a message and two jobs on a node do not collide; and from
    # the restart, as ranks of the previous attempt may still live on a node that Slurm gave up too early.
    attempt = _number(environ, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environ else 0
    port = 20000 + (_number(environ, "SLURM_JOB_ID") * 7 + _number(environ, "SLURM_STEP_ID") + attempt) % 20000
    if "MASTER_PORT" in environ:
        port = _port(environ)
    return World(rank, local_rank, size, environ.get("MASTER_ADDR") or first_host(nodes), port)


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


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError as error:
        raise UsageError(f"the environment lacks {name}") from error
    except ValueError as error:
        raise UsageError(f"{name}={environ[name][:60]!r} is not a number") from error
