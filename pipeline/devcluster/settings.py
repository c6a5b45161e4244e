"""The settings of a devcluster and the places of its files; written once by `up`, read by every later command."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.files import read_json, write_json

CGROUPS = Path("/sys/fs/cgroup")
LOGIN = "login"
CLIENTS = (
    "sbatch", "srun", "salloc", "scancel", "squeue", "sinfo", "scontrol", "sacct", "sacctmgr", "sstat", "sprio",
    "sdiag",
)  # fmt: skip
CPUS_PER_NODE = 4
GPUS_PER_NODE = 4
MEMORY_MB_PER_NODE = 8000

PRIVATE = ("/tmp", "/dev/shm")
"""Folders that each node has for itself, as the nodes of a real cluster do."""

_FILE = "cluster.json"
# The path of a socket must fit in 107 bytes, and munge adds `.lock` to its own.
_LONGEST_STATE = 80
_UNFIT = re.compile(r"""[\s,#%'"\\:$]""")


@dataclass(frozen=True)
class Settings:
    """One devcluster."""

    state: Path
    """Folder of everything it writes; `down` removes it."""
    node_count: int
    """Compute nodes, 1 to 16."""
    letter: str
    """First letter of the names of the nodes; their number follows."""
    cgroups: bool
    """Whether Slurm tracks and confines jobs by cgroup v1; if not, it tracks the process tree."""

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return [f"{self.letter}{i}" for i in range(1, self.node_count + 1)]

    @property
    def no_node(self) -> str:
        """A name that is like a node's and none of them; see `files.keep_letter`."""
        return f"{self.letter}0"

    @property
    def hosts(self) -> list[str]:
        """The login host, which is also the controller, and the compute nodes."""
        return [LOGIN, *self.nodes]

    @property
    def conf(self) -> Path:
        """The slurm.conf; Slurm finds its other configuration files beside it."""
        return self.state / "etc" / "slurm.conf"

    @property
    def bin(self) -> Path:
        """Slurm's client commands, for the shell of the machine and for jobs."""
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        """Logs of hosts and daemons."""
        return self.state / "log"

    @property
    def munge_socket(self) -> Path:
        """The socket at which all hosts reach munged."""
        return self.state / "munge" / "munge.sock"

    @property
    def database(self) -> Path:
        """Folder of MariaDB: a tmpfs that only the login host sees."""
        return self.state / "database"

    def address(self, host: str) -> str:
        """Returns the IPv4 address of a host, which is valid inside the cluster only."""
        return f"10.66.0.{1 + self.hosts.index(host)}"

    def hardware_address(self, host: str) -> str:
        """Returns the MAC address of a host's network card, which it keeps through a power failure."""
        return "02:00:" + ":".join(f"{int(part):02x}" for part in self.address(host).split("."))

    def node(self, name: str) -> str:
        """Returns the name of the node that `2` or `n2` stands for.

        Raises:
            UsageError: There is no such node; the message lists the nodes.
        """
        wanted = f"{self.letter}{name}" if name.isdigit() else name
        if wanted not in self.nodes:
            raise UsageError(f"{name}: no such node; the nodes are {', '.join(self.nodes)}")
        return wanted

    def save(self) -> None:
        """Writes the settings into the state folder."""
        write_json(self.state / _FILE, {**asdict(self), "state": str(self.state)})


def state_folder(path: str | Path) -> Path:
    """Returns the absolute path of the state folder.

    Raises:
        UsageError: The path is too long for the sockets in the folder, or the services could not be given it.
    """
    state = Path(path).absolute()
    unfit = _UNFIT.search(str(state))
    if unfit is not None:
        raise UsageError(
            f"{state}: has {unfit[0]!r} in its name, which MariaDB's or Slurm's files do not take; "
            "choose another --state"
        )
    if len(str(state)) > _LONGEST_STATE:
        raise UsageError(
            f"{state}: longer than the {_LONGEST_STATE} characters that sockets allow; choose another --state"
        )
    return state


def refuse_private(what: str, path: str | Path) -> None:
    """Refuses a path that the nodes of a cluster would not see.

    Args:
        what: What it is, for the message.
        path: The path.

    Raises:
        UsageError: It is below a folder that each node has for itself.
    """
    place = Path(path).resolve()
    hidden = next((folder for folder in PRIVATE if place.is_relative_to(folder)), None)
    if hidden is not None:
        raise UsageError(
            f"{place}: {what} is below {hidden}, which each node of a devcluster has for itself, so that no job would "
            "see it; use a folder elsewhere, for example below /var/tmp"
        )


def exists(state: Path) -> bool:
    """Tells whether there is a devcluster in this folder."""
    return (state / _FILE).is_file()


def load(state: Path) -> Settings:
    """Returns the settings of the cluster in this folder.

    Raises:
        PipelineError: There is no cluster in this folder.
    """
    if not exists(state):
        raise PipelineError(f"no devcluster in {state}; start one with `pipeline devcluster up`")
    return Settings(**{**read_json(state / _FILE), "state": state})
