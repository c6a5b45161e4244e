"""What a devcluster is made of and where its files are; written once by `up`, read by every later command."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import PipelineError, UsageError
from pipeline.files import read_json, write_json

LOGIN = "login"
CLIENTS = (
    "sbatch", "srun", "salloc", "scancel", "squeue", "sinfo", "scontrol", "sacct", "sacctmgr", "sstat", "sprio",
    "sdiag",
)  # fmt: skip
CPUS_PER_NODE = 4
GPUS_PER_NODE = 4
MEMORY_MB_PER_NODE = 8000

_FILE = "cluster.json"
# A socket's whole path fits in 107 bytes, and munge adds `.lock` to its own.
_LONGEST_STATE = 80


@dataclass(frozen=True)
class Settings:
    """One devcluster.

    Attributes:
        state: Folder of everything it writes; gone after `down`.
        node_count: Compute nodes, 1 to 16.
        letter: What the nodes' names begin with, before their number.
        cgroups: Whether Slurm tracks and confines jobs by cgroup v1; by the process tree without.
    """

    state: Path
    node_count: int
    letter: str
    cgroups: bool

    @property
    def nodes(self) -> list[str]:
        """Names of the compute nodes."""
        return [f"{self.letter}{i}" for i in range(1, self.node_count + 1)]

    @property
    def hosts(self) -> list[str]:
        """The login host, which is the controller too, and the compute nodes."""
        return [LOGIN, *self.nodes]

    @property
    def conf(self) -> Path:
        """The slurm.conf; its siblings are where Slurm looks for them."""
        return self.state / "etc" / "slurm.conf"

    @property
    def bin(self) -> Path:
        """Slurm's client commands, for the machine's own shell and for jobs."""
        return self.state / "bin"

    @property
    def logs(self) -> Path:
        """Logs of hosts and daemons."""
        return self.state / "log"

    @property
    def munge_socket(self) -> Path:
        """Where all hosts reach the one munged."""
        return self.state / "munge" / "munge.sock"

    @property
    def database(self) -> Path:
        """MariaDB's folder: memory that only the login host sees."""
        return self.state / "database"

    def address(self, host: str) -> str:
        """IPv4 address of a host, inside the cluster only."""
        return f"10.66.0.{1 + self.hosts.index(host)}"

    def node(self, name: str) -> str:
        """The node a person means by `2` or `n2`.

        Raises:
            UsageError: There is no such node; the message lists those there are.
        """
        wanted = f"{self.letter}{name}" if name.isdigit() else name
        if wanted not in self.nodes:
            raise UsageError(f"{name}: no such node; there are {', '.join(self.nodes)}")
        return wanted

    def save(self) -> None:
        """Writes the settings into the state folder."""
        write_json(self.state / _FILE, {**asdict(self), "state": str(self.state)})


def state_folder(path: str | Path) -> Path:
    """The absolute state folder.

    Raises:
        UsageError: Its path is too long for the sockets in it.
    """
    state = Path(path).absolute()
    if len(str(state)) > _LONGEST_STATE:
        raise UsageError(
            f"{state}: longer than the {_LONGEST_STATE} characters that sockets allow; choose another --state"
        )
    return state


def exists(state: Path) -> bool:
    """Whether a devcluster was made in this folder."""
    return (state / _FILE).is_file()


def load(state: Path) -> Settings:
    """The settings of the cluster in this folder.

    Raises:
        PipelineError: There is none.
    """
    if not exists(state):
        raise PipelineError(f"no devcluster in {state}; start one with `pipeline devcluster up`")
    return Settings(**{**read_json(state / _FILE), "state": state})
