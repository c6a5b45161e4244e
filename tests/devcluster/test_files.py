"""The files a devcluster starts from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.devcluster import files, hosts
from pipeline.devcluster.cluster import INSTALL_SCRIPT
from pipeline.devcluster.settings import CLIENTS, Settings
from pipeline.errors import PipelineError


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "state", 2, "q", False)


def test_a_second_cluster_takes_the_next_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.devcluster.files.CGROUPS", tmp_path)
    taken = []
    for letter in "nmpqrstuvw":
        assert files.free_letter() == letter
        group = tmp_path / ("memory", "freezer")[len(taken) % 2] / f"slurm_{letter}{len(taken) % 3 + 1}"
        group.mkdir(parents=True)
        taken.append(group)
    with pytest.raises(PipelineError, match=r"slurm_n\* to slurm_w\* are in use"):
        files.free_letter()


def test_a_letter_is_in_use_while_no_node_has_power(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("files", "hosts"):
        monkeypatch.setattr(f"pipeline.devcluster.{module}.CGROUPS", tmp_path)
    (tmp_path / "freezer").mkdir()
    made = Settings(tmp_path / "state", 2, files.free_letter(), True)
    files.keep_letter(made)
    assert files.free_letter() != made.letter
    hosts.remove_cgroups(made.no_node)
    assert files.free_letter() == made.letter


def test_slurm_is_configured_for_every_node(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    devices: list[str] = []
    monkeypatch.setattr("os.mknod", lambda path, mode, device: devices.append(Path(path).name))
    files.write_files(settings)
    conf = settings.conf.read_text()
    assert [line for line in conf.splitlines() if "$" in line] == []
    nodes = [dict(part.split("=", 1) for part in line.split()) for line in conf.splitlines() if "NodeName=" in line]
    assert [(node["NodeName"], node["NodeAddr"], node["CPUs"]) for node in nodes] == [
        ("q1", "10.66.0.2", "4"), ("q2", "10.66.0.3", "4"),
    ]  # fmt: skip
    assert {(node["RealMemory"], node["Gres"]) for node in nodes} == {("8000", "gpu:pretended:4")}
    assert devices == ["gpu0", "gpu1", "gpu2", "gpu3"]
    assert "/dev/gpu[0-3]" in (settings.conf.parent / "gres.conf").read_text()
    assert "ProctrackType=proctrack/linuxproc" in conf
    hosts = (settings.conf.parent / "hosts").read_text().splitlines()
    assert hosts[0] == "127.0.0.1 localhost" and "10.66.0.2 q1" in hosts and "::ffff:10.66.0.3 q2" in hosts


def test_secrets_are_readable_by_their_owner_only(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.mknod", lambda *args: None)
    files.write_files(settings)
    key = settings.state / "munge" / "munge.key"
    assert key.stat().st_mode & 0o777 == 0o400 and len(key.read_bytes()) == 1024
    assert (settings.conf.parent / "slurmdbd.conf").stat().st_mode & 0o777 == 0o600


def test_every_client_is_a_script_that_runs_on_the_login_host(settings: Settings):
    settings.bin.mkdir(parents=True)
    files.write_clients(settings, 4711)
    for client in CLIENTS:
        script = settings.bin / client
        assert script.stat().st_mode & 0o777 == 0o755 and "nsenter --target 4711 --net" in script.read_text()
        subprocess.run(["sh", "-n", script], check=True)


def test_a_job_is_not_submitted_from_a_folder_that_its_node_does_not_see(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
):
    settings.bin.mkdir(parents=True)
    programs = settings.state / "programs"
    programs.mkdir()
    (programs / "nsenter").write_text("#!/bin/sh\necho entered\n")
    (programs / "nsenter").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    files.write_clients(settings, 4711)
    outcomes = {
        (client, folder): subprocess.run([settings.bin / client], cwd=folder, capture_output=True, text=True)
        for client in ("sbatch", "squeue")
        for folder in ("/tmp", "/var/tmp")
    }
    refused = outcomes.pop(("sbatch", "/tmp"))
    assert refused.returncode == 1 and refused.stderr.startswith("/tmp: is below /tmp, which each node has for itself")
    assert {done.stdout for done in outcomes.values()} == {"entered\n"}


def test_the_install_script_is_in_the_package():
    subprocess.run(["bash", "-n", INSTALL_SCRIPT], check=True)
