"""Hosts of a devcluster, as far as they can be tried without namespaces; real ones are in tests/cluster."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pipeline.devcluster import hosts
from pipeline.devcluster.settings import Settings
from pipeline.errors import PipelineError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "run").mkdir()
    return Settings(tmp_path, 1, "n", False)


def test_the_id_of_a_process_that_has_ended_is_not_taken_for_the_host(settings: Settings):
    assert hosts.pid_of(settings, "n1") is None
    process = subprocess.Popen(["sleep", "60"])
    try:
        started = hosts._start_time(process.pid)
        (settings.state / "run" / "n1.host").write_text(f"{process.pid} {started}\n")
        assert hosts.pid_of(settings, "n1") == process.pid
        (settings.state / "run" / "n1.host").write_text(f"{process.pid} {int(started) - 1}\n")
        assert hosts.pid_of(settings, "n1") is None
    finally:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert hosts._start_time(process.pid) == ""  # a zombie is not running
    process.wait()
    assert hosts._start_time(process.pid) == ""


def test_a_command_on_a_host_that_is_down_is_refused(settings: Settings):
    with pytest.raises(PipelineError, match="n1"):
        hosts.enter(settings, "n1", ["true"])


def test_the_environment_puts_the_clients_first_once(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", f"/usr/bin:{settings.bin}")
    found = hosts.environment(settings)
    assert found["PATH"] == f"{settings.bin}:/usr/bin" and found["SLURM_CONF"] == str(settings.conf)


def test_a_network_command_that_fails_is_an_error_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nsenter"
    program.write_text(
        f"#!/bin/sh\ncat >{tmp_path}/lines\ngrep -q up {tmp_path}/lines && exit\necho no link >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    hosts._ip(1, ["link set lo up", "link set eth0 up"])
    assert (tmp_path / "lines").read_text() == "link set lo up\nlink set eth0 up\n"
    with pytest.raises(PipelineError, match=r"ip: no link$"):
        hosts._ip(1, ["link delete n1"])


def test_a_wait_that_fails_ends_with_the_last_lines_of_the_log(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("".join(f"line {n}\n" for n in range(20)))
    hosts.wait_for(lambda: True, 0.0, "answer")
    with pytest.raises(PipelineError, match=f"answer within 0 s\n{log}:\nline 12\n") as failed:
        hosts.wait_for(lambda: False, 0.0, "answer", log)
    assert str(failed.value).endswith("\nline 19")
