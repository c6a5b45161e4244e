"""The daemons of a devcluster, with scripts in place of Slurm's commands; real ones are in tests/cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.devcluster import cluster, hosts, services
from pipeline.devcluster.settings import Settings
from pipeline.errors import PipelineError

Says = Callable[[str, str], None]
REGISTERED = "NodeName={} Arch=x State=IDLE CPUTot=4 SlurmdStartTime=2026-01-01T00:00:00 LastBusyTime=None"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Returns a cluster of two nodes: n1 is up, n2 is down; commands run on this machine."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    settings = Settings(Path("state"), 2, "n", False)
    for folder in (settings.logs, settings.state / "run", settings.munge_socket.parent):
        folder.mkdir(parents=True)
    (settings.state / "run" / "n1.host").write_text(f"{os.getpid()} {hosts._start_time(os.getpid())}\n")
    monkeypatch.setattr(hosts, "enter", lambda settings, host, command: command)
    monkeypatch.setattr(services, "_START_S", 0.0)
    return settings


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Returns a function that puts a shell script in the place of a command."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def write(command: str, script: str) -> None:
        (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / command).chmod(0o755)

    write("setsid", "exit 0")  # no daemon is started
    return write


def test_munged_has_started_once_it_listens_on_its_socket(settings: Settings, says: Says):
    with pytest.raises(PipelineError, match="munged"):
        services.start_munge(settings)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(settings.munge_socket))
        listener.listen()
        services.start_munge(settings)


def test_an_account_that_cannot_be_added_is_named(settings: Settings, says: Says):
    says("sacctmgr", 'echo "$*" >> asked')
    services.start_accounting(settings)
    assert "user root account=research,teaching" in Path("asked").read_text()
    says("sacctmgr", 'case "$*" in *user*) exit 1; esac')
    with pytest.raises(PipelineError, match="add user root"):
        services.start_accounting(settings)


def test_a_restarted_controller_waits_for_the_nodes_that_are_up_and_for_no_other(settings: Settings, says: Says):
    says("sh", "case \"$*\" in *'kill -0'*) exit 1; esac")  # slurmctld ends as soon as it is told to
    says("scontrol", f'[ "$1" = ping ] && echo Slurmctld is UP || echo "{REGISTERED.format("n1")}"')
    cluster.restart_controller(settings)
    says("scontrol", f'[ "$1" = ping ] && echo Slurmctld is UP || echo "{REGISTERED.format("n2")}"')
    with pytest.raises(PipelineError, match="n1"):
        cluster.restart_controller(settings)


def test_the_status_tells_hosts_that_are_up_and_what_slurm_says_of_them(settings: Settings, says: Says):
    says("sinfo", "echo 'n1 idle'; echo 'n2 down*'")
    found = [(host.host, host.up, host.slurm) for host in cluster.status(settings)]
    assert found == [("login", False, "login"), ("n1", True, "idle"), ("n2", False, "down*")]
    says("sinfo", "echo no controller >&2; exit 1")
    with pytest.raises(PipelineError, match="no controller"):
        cluster.status(settings)
