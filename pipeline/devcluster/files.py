"""The files a cluster is started from: its settings as Slurm reads them, and the client commands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from string import Template

from pipeline.devcluster.hosts import NAMESPACES
from pipeline.devcluster.settings import CLIENTS, CPUS_PER_NODE, GPUS_PER_NODE, LOGIN, MEMORY_MB_PER_NODE, Settings
from pipeline.errors import PipelineError
from pipeline.files import write_bytes, write_text

_TEMPLATES = Path(__file__).with_name("templates")
# A major number that no driver has. One of a real device would bar jobs from that device.
_GPU_MAJOR = 240
_BY_CGROUP = "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nJobAcctGatherType=jobacct_gather/cgroup"
_BY_TREE = "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/linux"
# Jobs of another cluster's nodes with the same names would share their control groups.
_LETTERS = "nmpqrstuvw"
_CONTROLLERS = ("freezer", "memory", "devices", "cpuset", "cpuacct")
CGROUPS = Path("/sys/fs/cgroup")


def has_cgroup_v1() -> bool:
    """Whether this machine has the control groups of version 1 that Slurm 22.05 can use without systemd."""
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    return all(kinds.get(str(CGROUPS / name)) == "cgroup" for name in _CONTROLLERS)


def free_letter() -> str:
    """The first letter for nodes' names that no other cluster on this machine uses."""
    for letter in _LETTERS:
        if not any((CGROUPS / name / f"slurm_{letter}1").exists() for name in _CONTROLLERS):
            return letter
    raise PipelineError(
        f"{CGROUPS}: groups slurm_{_LETTERS[0]}1 to slurm_{_LETTERS[-1]}1 are all there; take a cluster down"
    )


def write_files(settings: Settings) -> None:
    """Makes the state folder's tree, Slurm's settings, munge's key and the pretended GPUs."""
    for name in ("etc", "munge", "run", "log", "bin", "dev", "slurmctld", "slurmd", "database"):
        (settings.state / name).mkdir(mode=0o755, parents=True)
    etc = settings.conf.parent
    names = [("127.0.0.1", "localhost"), *((settings.address(h), h) for h in settings.hosts)]
    # torch asks for the name of the IPv4 address in its IPv6 form, and would ask a name server that is not there.
    mapped = [(f"::ffff:{address}", name) for address, name in names[1:]]
    write_text(etc / "hosts", "".join(f"{address} {name}\n" for address, name in [*names, *mapped]))
    values = {
        "state": str(settings.state),
        "munge_socket": str(settings.munge_socket),
        "login_address": settings.address(LOGIN),
        "tracking": _BY_CGROUP if settings.cgroups else _BY_TREE,
        "nodes": "\n".join(_node_line(settings, node) for node in settings.nodes),
    }
    for name in ("slurm.conf", "slurmdbd.conf", "cgroup.conf"):
        write_text(etc / name, _template(name).substitute(values))
    # It would hold the database's password, so slurmdbd insists.
    (etc / "slurmdbd.conf").chmod(0o600)
    last = GPUS_PER_NODE - 1
    write_text(etc / "gres.conf", f"Name=gpu Type=pretended File={settings.state}/dev/gpu[0-{last}]\n")
    for number in range(GPUS_PER_NODE):
        os.mknod(settings.state / "dev" / f"gpu{number}", 0o020666, os.makedev(_GPU_MAJOR, number))
    write_bytes(_key(settings), os.urandom(1024))
    _key(settings).chmod(0o400)


def write_clients(settings: Settings, login_pid: int) -> None:
    """Writes sbatch, squeue and the others; they need the login host's process id."""
    for client in CLIENTS:
        path = settings.bin / client
        text = _template("client.sh").substitute(
            client=client, conf=settings.conf, machine=Path("/proc/self/ns/net").readlink(), login_pid=login_pid,
            namespaces=" ".join(NAMESPACES), program=shutil.which(client, path="/usr/bin:/usr/local/bin"),
        )  # fmt: skip
        write_text(path, text)
        path.chmod(0o755)


def _node_line(settings: Settings, node: str) -> str:
    return (
        f"NodeName={node} NodeHostname={node} NodeAddr={settings.address(node)} CPUs={CPUS_PER_NODE} "
        f"RealMemory={MEMORY_MB_PER_NODE} Gres=gpu:pretended:{GPUS_PER_NODE} State=UNKNOWN"
    )


def _template(name: str) -> Template:
    return Template((_TEMPLATES / name).read_text())


def _key(settings: Settings) -> Path:
    return settings.state / "munge" / "munge.key"
