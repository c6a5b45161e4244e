"""The files a cluster starts from: the configuration of Slurm and the client commands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from string import Template

from pipeline.devcluster.hosts import NAMESPACES
from pipeline.devcluster.settings import (
    CGROUPS,
    CLIENTS,
    CPUS_PER_NODE,
    GPUS_PER_NODE,
    LOGIN,
    MEMORY_MB_PER_NODE,
    Settings,
)
from pipeline.errors import PipelineError
from pipeline.files import write_bytes, write_text

_TEMPLATES = Path(__file__).with_name("templates")
# A major number without a driver: that of a real device would bar jobs from using it.
_GPU_MAJOR = 240
_BY_CGROUP = "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nJobAcctGatherType=jobacct_gather/cgroup"
_BY_TREE = "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/linux"
# Each cluster of a machine takes its own letter: nodes with the same name would share the control groups of jobs.
_LETTERS = "nmpqrstuvw"
_CONTROLLERS = ("freezer", "memory", "devices", "cpuset", "cpuacct")


def has_cgroup_v1() -> bool:
    """Tells whether this machine has cgroup v1, which Slurm 22.05 can use without systemd."""
    kinds = {line.split()[1]: line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    return all(kinds.get(str(CGROUPS / name)) == "cgroup" for name in _CONTROLLERS)


def free_letter() -> str:
    """Returns the first letter for the names of nodes that no other cluster on this machine uses."""
    for letter in _LETTERS:
        if not any(group for name in _CONTROLLERS for group in (CGROUPS / name).glob(f"slurm_{letter}[0-9]*")):
            return letter
    raise PipelineError(
        f"{CGROUPS}: all groups from slurm_{_LETTERS[0]}* to slurm_{_LETTERS[-1]}* are in use; take a cluster down"
    )


def keep_letter(settings: Settings) -> None:
    """Makes a control group by which the cluster's letter counts as in use while nodes of it are without power."""
    if settings.cgroups:
        (CGROUPS / "freezer" / f"slurm_{settings.no_node}").mkdir()


def write_files(settings: Settings) -> None:
    """Writes the folders of the state folder, Slurm's configuration, munge's key and the simulated GPUs."""
    for name in ("etc", "munge", "run", "log", "bin", "dev", "slurmctld", "slurmd", "database"):
        (settings.state / name).mkdir(mode=0o755, parents=True)
    etc = settings.conf.parent
    names = [("127.0.0.1", "localhost"), *((settings.address(h), h) for h in settings.hosts)]
    # torch looks up the IPv6 form of an IPv4 address; without this entry it would ask a name server, and there is none.
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
    # slurmdbd refuses to read its configuration otherwise, since it may hold the password of the database.
    (etc / "slurmdbd.conf").chmod(0o600)
    last = GPUS_PER_NODE - 1
    write_text(etc / "gres.conf", f"Name=gpu Type=pretended File={settings.state}/dev/gpu[0-{last}]\n")
    for number in range(GPUS_PER_NODE):
        os.mknod(settings.state / "dev" / f"gpu{number}", 0o020666, os.makedev(_GPU_MAJOR, number))
    write_bytes(_key(settings), os.urandom(1024))
    _key(settings).chmod(0o400)


def write_clients(settings: Settings, login_pid: int) -> None:
    """Writes sbatch, squeue and the other client commands, which contain the process id of the login host."""
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
