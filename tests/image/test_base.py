"""The argument files of an image's base: what is refused before anything is fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.files import sha256_file
from pipeline.image.base import Base, read_base, without_registry
from tests.cli.test_main import ROOT


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("BOOTSTRAP=docker\nFROM=debian:bookworm\nACCELERATOR=cuda", ("FROM=debian:bookworm", "not pinned", "skopeo")),
        ("BOOTSTRAP=docker\nFROM=debian@sha256:12\nACCELERATOR=cuda", ("FROM=debian@sha256:12", "not pinned")),
        ("BOOTSTRAP=yum\nFROM=x\nACCELERATOR=cpu", ("BOOTSTRAP=yum", "debootstrap, docker, docker-archive")),
        ("BOOTSTRAP=docker\nFROM=x\nACCELERATOR=tpu", ("ACCELERATOR=tpu", "cpu, cuda, rocm")),
        ("BOOTSTRAP=docker\nACCELERATOR=cpu", ("FROM is missing",)),
        ("BOOTSTRAP=docker-archive\nFROM=/not/there.tar\nACCELERATOR=cpu", ("FROM=/not/there.tar", "does not exist")),
        ("BOOTSTRAP=docker\nFROM=x\nACCELERATOR=cuda\nTORCH=mine", ("TORCH=mine", "allowed: base")),
        ("BOOTSTRAP=docker\nFROM=x\nACCELERATOR=cuda\nPYTHON=3.9", ("PYTHON=3.9", "3.11 or newer")),
        ("# a comment\n\nBOOTSTRAP docker", ("line 3", "'BOOTSTRAP docker'", "NAME=VALUE")),
    ],
)
def test_an_argument_file_that_does_not_pin_a_base_is_refused(tmp_path, lines, words):
    file = tmp_path / "mine.args"
    file.write_text(lines + "\n")
    with pytest.raises(UsageError, match=re.escape(str(file))) as refused:
        read_base(str(file), ROOT)
    assert [word for word in words if word not in str(refused.value)] == []


def test_an_archive_is_pinned_by_the_digest_of_its_file(tmp_path):
    (tmp_path / "base.tar").write_bytes(b"base")
    file = tmp_path / "mine.args"
    file.write_text(f"BOOTSTRAP=docker-archive\nFROM={tmp_path}/base.tar\nACCELERATOR=cpu\n")
    assert read_base(str(file), ROOT).digest == f"sha256:{sha256_file(tmp_path / 'base.tar')}"


def test_an_unknown_base_lists_the_known_ones():
    with pytest.raises(UsageError, match="--base gpu: .*cpu, cuda, rocm "):
        read_base("gpu", ROOT)


def test_the_shipped_registry_bases_are_pinned():
    for name in ("cuda", "rocm"):
        base = read_base(name, ROOT)
        assert base.accelerator == name and re.fullmatch(r"sha256:[0-9a-f]{64}", base.digest or "")


def test_apptainer_itself_can_read_the_argument_files():
    """Apptainer knows no comments: it skips a line without `=` and takes any other line as an argument."""
    for file in (ROOT / "containers").glob("*.args"):
        keys = [line.partition("=")[0] for line in file.read_text().splitlines() if "=" in line]
        assert keys == ["BOOTSTRAP", "FROM", "ACCELERATOR"], file


def test_only_a_bare_debian_is_made_without_its_registry(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.image.base._apt_mirror", lambda file: "http://mirror")
    made = without_registry(read_base("cuda", ROOT))
    assert made is not None and made.accelerator == "cuda" and made.digest is None
    wanted = {"BOOTSTRAP": "debootstrap", "FROM": "debian:bookworm", "SUITE": "bookworm", "MIRROR": "http://mirror"}
    assert wanted.items() <= made.arguments.items()
    vendor = Base(
        "mine", {"BOOTSTRAP": "docker", "FROM": "nvcr.io/nvidia/pytorch@sha256:0", "ACCELERATOR": "cuda"}, "0"
    )
    assert without_registry(vendor) is None


def test_debootstrap_is_found_outside_a_users_path_and_a_mirror_of_the_file_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "mine.args"
    file.write_text("BOOTSTRAP=debootstrap\nFROM=debian:bookworm\nACCELERATOR=cpu\nMIRROR=http://mirror\n")
    monkeypatch.setenv("PATH", "/not/there")
    monkeypatch.setattr("pipeline.image.base._ADMIN_FOLDERS", (str(tmp_path / "sbin"),))
    with pytest.raises(UsageError, match="mine.args: debootstrap .*apt-get install"):
        read_base(str(file), ROOT)
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "debootstrap").touch(mode=0o755)
    assert read_base(str(file), ROOT).arguments["MIRROR"] == "http://mirror"


def test_debootstrap_uses_the_mirror_of_this_machine_s_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The archive of security updates lacks the base packages."""
    file = tmp_path / "mine.args"
    file.write_text("BOOTSTRAP=debootstrap\nFROM=debian:bookworm\nACCELERATOR=cpu\n")
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": "bookworm"})
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "debootstrap").touch(mode=0o755)
    apt = tmp_path / "apt-get"
    apt.write_text("#!/bin/sh\necho http://security bookworm-security main\necho http://mirror bookworm main\n")
    apt.chmod(0o755)
    assert read_base(str(file), ROOT).arguments["MIRROR"] == "http://mirror"
    apt.write_text("#!/bin/sh\necho http://security bookworm-security main\n")
    with pytest.raises(UsageError, match="mine.args: .*MIRROR="):
        read_base(str(file), ROOT)
