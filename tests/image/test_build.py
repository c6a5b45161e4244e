"""Building an image: the commit it is recorded with, and what is refused before Apptainer starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import UsageError
from pipeline.files import sha256_bytes
from pipeline.image.apptainer import RegistryNotReached
from pipeline.image.base import Base, read_base
from pipeline.image.build import _build, _check_free_space, _publish, _record, commit_of
from pipeline.image.record import digest, read_record, record_file, write_record
from tests.cli.test_main import ROOT


def test_an_untracked_source_file_marks_the_commit_of_an_image_as_dirty(tmp_path: Path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "a.py").touch()
    assert commit_of(tmp_path) == "unknown"
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "notes.txt").touch()  # not part of the image
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.yaml").touch()  # nor is this: the wheel holds the package alone
    assert commit_of(tmp_path) == clean
    (tmp_path / "pipeline" / "b.py").touch()
    assert commit_of(tmp_path) == f"{clean}-dirty"


def test_a_checkout_that_cannot_be_written_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkout = tmp_path / "checkout"
    for name in ("pipeline", "containers"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Apptainer.def", checkout)
    (checkout / "build").touch()  # root can write where others cannot, but not into a file
    _fake_apptainer(tmp_path, monkeypatch)
    archive = tmp_path / "base.tar"
    archive.touch()
    base = tmp_path / "mine.args"
    base.write_text(f"BOOTSTRAP=docker-archive\nFROM={archive}\nACCELERATOR=cpu\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "image", "build", "--base", str(base)],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"pipeline: error: {checkout}/build/images: ") and "Not a directory" in done.stderr


def _fake_apptainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "bin" / "apptainer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho apptainer version 1.4.5\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


def test_a_bare_debian_is_made_without_its_registry_and_the_record_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given, said = [], []

    def build(definition: Path, target: Path, arguments: dict[str, str], *_: object, **options: object) -> None:
        given.append(arguments["BOOTSTRAP"])
        if arguments["BOOTSTRAP"] == "docker":
            raise RegistryNotReached("it failed", "no registry")
        target.write_bytes(b"SIF")

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    shutil.copytree(ROOT / "containers", tmp_path / "containers")
    for name, does in (
        ("build", build), ("wheelhouse", lambda *_: wheels), ("project_wheel", lambda *_: None),
        ("run_inside", lambda *_: "a=1\n"),
    ):  # fmt: skip
        monkeypatch.setattr(f"pipeline.image.build.{name}", does)
    monkeypatch.setattr("pipeline.image.base._apt_mirror", lambda file: "http://mirror")
    monkeypatch.setattr("pipeline.image.base._ADMIN_FOLDERS", (str(tmp_path),))
    (tmp_path / "debootstrap").touch(mode=0o755)
    image = _build(tmp_path, read_base("cuda", ROOT), False, "1.4.5", SimpleNamespace(show=said.append))
    assert given == ["docker", "debootstrap"] and any("no registry" in line for line in said)
    base = read_record(image)["base"]
    assert (base["bootstrap"], base["name"]) == ("debootstrap", "debian:bookworm")

    vendor = Base("mine", {"BOOTSTRAP": "docker", "FROM": "a@sha256:0", "ACCELERATOR": "cuda"}, "sha256:0")
    with pytest.raises(RegistryNotReached):
        _build(tmp_path, vendor, False, "1.4.5", SimpleNamespace(show=said.append))


def test_too_little_space_is_refused_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("zeros", bytes(10_000_000))
    needed = 0.9e9 + 10e6
    for free, refused in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        with pytest.raises(UsageError, match=f"{tmp_path}: 0.9 GB .*APPTAINER_TMPDIR") if refused else nullcontext():
            _check_free_space(tmp_path, tmp_path)


@pytest.mark.parametrize("digest", ["sha256:0", None])
def test_a_base_without_a_digest_is_recorded_by_its_list_of_packages(monkeypatch: pytest.MonkeyPatch, digest):
    monkeypatch.setattr("pipeline.image.build.run_inside", lambda image, cat, file: f"{Path(file).stem}=1\nother=2\n")
    base = Base("cpu", {"BOOTSTRAP": "debootstrap", "FROM": "debian", "ACCELERATOR": "cpu"}, digest)
    record = _record(base, Path("a.sif"), {"VERSION": "1", "COMMIT": "abc", "LOCK": "def"})
    by_packages = f"sha256:{sha256_bytes(b'system-packages=1' + bytes([10]) + b'other=2' + bytes([10]))}"
    assert record["base"] == {"bootstrap": "debootstrap", "name": "debian", "digest": digest or by_packages}
    assert record["python_packages"] == ["python-packages=1", "other=2"]
    assert record["system_packages"] == ["system-packages=1", "other=2"]


def test_a_record_never_stands_beside_another_image(tmp_path: Path):
    image, temp = tmp_path / "box", tmp_path / ".box.new"
    for folder, content in ((image, "old"), (temp, "new")):
        folder.mkdir()
        (folder / "file").write_text(content)
    write_record(image, {"commit": "old"})
    _publish(temp, image, {"commit": "new"})
    assert (image / "file").read_text() == "new"
    assert (read_record(image)["commit"], read_record(image)["sha256"]) == ("new", digest(image))
    assert sorted(tmp_path.iterdir()) == [image, record_file(image)]
