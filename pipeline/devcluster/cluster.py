"""A devcluster as a whole: starts and ends it, reports its state, and causes failures of its parts."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.devcluster import services
from pipeline.devcluster.files import free_letter, has_cgroup_v1, keep_letter, write_clients, write_files
from pipeline.devcluster.hosts import kill_host, pid_of, remove_cgroups, run_on, start_host, wait_for
from pipeline.devcluster.settings import CGROUPS, LOGIN, Settings, exists, load, refuse_private
from pipeline.errors import PipelineError, UsageError
from pipeline.files import naming

INSTALL_SCRIPT = Path(__file__).with_name("install.sh")
_PROGRAMS = (
    "slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch", "sacctmgr", "ip",
    "nsenter", "unshare", "setsid",
)  # fmt: skip


@dataclass(frozen=True)
class HostState:
    """One line of `status`."""

    host: str
    address: str
    up: bool
    slurm: str
    """The state in Slurm; `login` for the login host, which is not a node."""


def up(state: Path, node_count: int) -> Settings:
    """Starts a cluster, or returns the one that is already running in this folder.

    Raises:
        UsageError: The nodes would not see the folders that jobs need.
        PipelineError: A program is missing, or a part did not start; whatever had started is taken down.
    """
    for what, path in (
        ("the folder of --state", state),
        ("the working folder", Path.cwd()),
        ("this Python", sys.prefix),
        ("the code of this command", Path(__file__)),
    ):
        refuse_private(what, path)
    _check_machine()
    if exists(state):
        settings = load(state)
        if pid_of(settings, LOGIN) is not None:
            if settings.node_count != node_count:
                raise UsageError(f"{state}: a cluster of {settings.node_count} nodes runs here; take it down first")
            return settings
        down(state)  # the remains of a cluster after a reboot
    with naming(state, "cannot be created", "choose another --state", UsageError):
        state.mkdir(parents=True, exist_ok=True)
    if any(state.iterdir()):
        raise UsageError(f"{state}: holds other files; choose an empty or new folder for --state")
    with _one_at_a_time():
        settings = Settings(state, node_count, free_letter(), has_cgroup_v1())
        settings.save()
        try:
            keep_letter(settings)
            _start(settings)
        except BaseException:
            down(state)
            raise
    return settings


def down(state: Path) -> None:
    """Ends everything and removes every trace; running jobs are lost.

    Raises:
        PipelineError: There is no cluster in this folder.
    """
    settings = load(state)
    for host in reversed(settings.hosts):
        kill_host(settings, host)
    remove_cgroups(settings.no_node)
    shutil.rmtree(state)


def status(settings: Settings) -> list[HostState]:
    """Returns the hosts and the state of each in Slurm.

    Raises:
        PipelineError: The login host is down, or the controller does not answer.
    """
    listed = run_on(settings, LOGIN, ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%N %T"])
    if listed.returncode != 0:
        raise PipelineError(f"slurmctld does not answer: {listed.stderr.strip()}")
    states = {LOGIN: "login", **dict(line.split() for line in listed.stdout.splitlines())}
    return [
        HostState(host, settings.address(host), pid_of(settings, host) is not None, states.get(host, "unknown"))
        for host in settings.hosts
    ]


def kill_node(settings: Settings, node: str) -> None:
    """Cuts a node's power.

    Raises:
        UsageError: The node is already down.
    """
    if pid_of(settings, node) is None:
        raise UsageError(f"{node} is already down; `pipeline devcluster start-node {node}` brings it back")
    kill_host(settings, node)


def start_node(settings: Settings, node: str) -> None:
    """Brings a node back up and waits until jobs can run on it.

    Raises:
        UsageError: The node is already up.
    """
    if pid_of(settings, node) is not None:
        raise UsageError(f"{node} is already up")
    old = services.registrations(settings)
    start_host(settings, node)
    # Slurm tells two starts of a node apart by their seconds only.
    wait_for(lambda: time.strftime("%Y-%m-%dT%H:%M:%S") != old.get(node), 2, "next second")
    services.start_slurmd(settings, node)
    services.wait_for_nodes(settings, [node], old)


def restart_controller(settings: Settings) -> None:
    """Restarts slurmctld and waits until the nodes have registered; running jobs continue."""
    services.stop_controller(settings)
    services.start_controller(settings)
    services.wait_for_nodes(settings, [node for node in settings.nodes if pid_of(settings, node) is not None])


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keeps other clusters of this machine from starting, so that no two find the same letter free."""
    folder = os.open(CGROUPS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _start(settings: Settings) -> None:
    write_files(settings)
    start_host(settings, LOGIN)
    login = pid_of(settings, LOGIN)
    assert login is not None
    write_clients(settings, login)
    with ThreadPoolExecutor() as pool:
        database = pool.submit(services.start_database, settings)
        services.start_munge(settings)
        for node in settings.nodes:
            start_host(settings, node)
        database.result()
    services.start_accounting(settings)
    # The daemons wait for each other, so their order does not matter.
    for node in settings.nodes:
        services.start_slurmd(settings, node)
    services.start_controller(settings)
    services.wait_for_nodes(settings, settings.nodes)


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise UsageError("a devcluster needs root: namespaces, mounts and daemons")
    missing = [name for name in _PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        raise PipelineError(
            f"{', '.join(missing)}: not installed here; `bash {INSTALL_SCRIPT}` installs Debian's packages"
        )
