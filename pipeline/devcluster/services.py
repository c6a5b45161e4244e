"""The daemons of a cluster: munge, MariaDB, slurmdbd and slurmctld on the login host, one slurmd on each node."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from pipeline.devcluster.hosts import run_on, start_daemon, tail, wait_for
from pipeline.devcluster.settings import LOGIN, Settings
from pipeline.errors import PipelineError

_START_S = 30.0
_USABLE = re.compile(r"(IDLE|MIXED|ALLOCATED)(\+COMPLETING)?")
ACCOUNTS = ("research", "teaching")


def start_munge(settings: Settings) -> None:
    """Starts munged. One serves all hosts, which share their clock and users."""
    log = settings.logs / "munged.log"
    folder = settings.munge_socket.parent
    command = [
        "munged", "--foreground", "--num-threads=4", f"--key-file={folder}/munge.key",
        f"--socket={settings.munge_socket}", f"--pid-file={folder}/munged.pid", f"--log-file={log}",
        f"--seed-file={folder}/seed",
        # munged rightly distrusts folders that others can write to; for a cluster of one machine that is no risk.
        "--force",
    ]  # fmt: skip
    start_daemon(settings, LOGIN, command, log)
    wait_for(lambda: _answers(settings.munge_socket), _START_S, "answer of munged", log)


def start_database(settings: Settings) -> None:
    """Creates MariaDB's tables in memory and serves them on the loopback interface of the login host."""
    log = settings.logs / "mariadb.log"
    data = settings.database / "data"
    common = ["--no-defaults", "--user=root", f"--datadir={data}", "--innodb-log-file-size=8M"]
    made = run_on(
        settings, LOGIN,
        ["mariadb-install-db", *common, "--auth-root-authentication-method=normal", "--skip-test-db"], _START_S,
    )  # fmt: skip
    log.write_text(made.stdout + made.stderr)
    if made.returncode != 0:
        raise PipelineError(f"mariadb-install-db failed:\n{tail(log)}")
    sock = settings.state / "run" / "mariadb.sock"
    options = [
        f"--socket={sock}", "--bind-address=127.0.0.1", "--port=3306", f"--pid-file={settings.state}/run/mariadb.pid",
        "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900", "--skip-name-resolve",
    ]  # fmt: skip
    start_daemon(settings, LOGIN, ["mariadbd", *common, *options], log)
    wait_for(lambda: _answers(sock), _START_S, "answer of MariaDB", log)


def start_accounting(settings: Settings) -> None:
    """Starts slurmdbd and registers the cluster, its accounts, and root as their user."""
    log = settings.logs / "slurmdbd.log"
    start_daemon(settings, LOGIN, ["slurmdbd", "-D"], settings.logs / "slurmdbd.out")
    wait_for(lambda: _sacctmgr(settings, "list", "cluster"), _START_S, "answer of slurmdbd", log)
    accounts = ",".join(ACCOUNTS)
    for words in (
        ["add", "cluster", "devcluster"],
        ["add", "account", accounts],
        ["add", "user", "root", f"account={accounts}"],
        ["modify", "user", "root", "set", f"defaultaccount={ACCOUNTS[0]}"],
    ):
        if not _sacctmgr(settings, *words):
            raise PipelineError(f"sacctmgr {' '.join(words)} failed:\n{tail(log)}")


def start_controller(settings: Settings) -> None:
    """Starts slurmctld and waits until it answers."""
    log = settings.logs / "slurmctld.log"
    start_daemon(settings, LOGIN, ["slurmctld", "-D"], settings.logs / "slurmctld.out")
    wait_for(
        lambda: " is UP" in run_on(settings, LOGIN, ["scontrol", "ping"]).stdout, _START_S, "answer of slurmctld", log
    )


def stop_controller(settings: Settings) -> None:
    """Ends slurmctld with SIGTERM, so that it saves its state first.

    Raises:
        PipelineError: slurmctld is not running, or did not end.
    """
    pid = settings.state / "run" / "slurmctld.pid"
    ended = run_on(settings, LOGIN, ["sh", "-c", f"kill -TERM $(cat {pid})"])
    if ended.returncode != 0:
        raise PipelineError(f"slurmctld is not running: {ended.stderr.strip()}")
    wait_for(
        lambda: run_on(settings, LOGIN, ["sh", "-c", f"kill -0 $(cat {pid})"]).returncode != 0,
        _START_S,
        "end of slurmctld",
    )


def start_slurmd(settings: Settings, node: str) -> None:
    """Starts slurmd, which makes a host a node; it registers by itself."""
    start_daemon(settings, node, ["slurmd", "-D", "-N", node], settings.logs / f"slurmd.{node}.out")


def registrations(settings: Settings) -> dict[str, str]:
    """Returns the nodes that jobs can run on, each with the start time of the slurmd that registered it.

    A controller that has just started sends jobs to nodes that have not registered again, and forgets their GPUs.
    """
    listed = run_on(settings, LOGIN, ["scontrol", "--oneliner", "show", "nodes"]).stdout
    found = re.findall(r"NodeName=(\S+) .*?State=(\S+) .*?SlurmdStartTime=(\S+)", listed)
    return {node: began for node, state, began in found if _USABLE.fullmatch(state) and began != "None"}


def wait_for_nodes(settings: Settings, nodes: list[str], old: dict[str, str] | None = None) -> None:
    """Waits until these nodes have registered; one that is listed in `old` must register again."""
    before = old or {}

    def registered() -> bool:
        now = registrations(settings)
        return all(node in now and now[node] != before.get(node) for node in nodes)

    wait_for(registered, _START_S, f"registration of {', '.join(nodes)}", settings.logs / "slurmctld.log")


def _sacctmgr(settings: Settings, *words: str) -> bool:
    # `list` returns 0 as soon as slurmdbd answers, even if there is nothing to list.
    return run_on(settings, LOGIN, ["sacctmgr", "--immediate", "--noheader", *words]).returncode == 0


def _answers(path: Path) -> bool:
    """Tells whether a process listens on a socket of the file system."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(os.fspath(path)) == 0
