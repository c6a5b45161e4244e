"""Building an image: what is fetched, what is refused before, and what is said while Apptainer works and fails."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, UsageError
from pipeline.image.apptainer import build
from pipeline.image.base import read_base
from pipeline.image.build import commit_of
from pipeline.image.wheels import wheelhouse
from tests.cli.test_main import ROOT

MACHINE = platform.machine()
# NVIDIA's wheels are for this one alone; Debian 12 has a newer glibc.
OLD_GLIBC = f"py3-none-manylinux_2_27_{MACHINE}"
NEWEST_GLIBC = f"cp311-cp311-manylinux_2_28_{MACHINE}"


# ---- bases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("BOOTSTRAP=docker\nFROM=debian:bookworm\nACCELERATOR=cuda", "is not pinned, so that two builds could differ"),
        ("BOOTSTRAP=docker\nFROM=debian@sha256:12\nACCELERATOR=cuda", "is not pinned"),
        ("BOOTSTRAP=yum\nFROM=x\nACCELERATOR=cpu", "BOOTSTRAP=yum, allowed: debootstrap, docker, docker-archive"),
        ("BOOTSTRAP=docker\nFROM=x\nACCELERATOR=tpu", "ACCELERATOR=tpu, allowed: cpu, cuda, rocm"),
        ("BOOTSTRAP=docker\nACCELERATOR=cpu", "FROM is missing"),
        ("BOOTSTRAP=docker-archive\nFROM=/not/there.tar\nACCELERATOR=cpu", "there is no such file"),
        ("BOOTSTRAP docker", "line 1: 'BOOTSTRAP docker', allowed: NAME=VALUE"),
    ],
)
def test_a_base_that_could_not_be_told_from_another_is_refused(tmp_path, lines, message):
    file = tmp_path / "mine.args"
    file.write_text(lines + "\n")
    with pytest.raises(UsageError, match=re.escape(message)):
        read_base(str(file), ROOT)


def test_an_unknown_base_lists_the_known_ones():
    with pytest.raises(UsageError, match="--base gpu: .*allowed: cpu, cuda, rocm, or the path"):
        read_base("gpu", ROOT)


def test_the_shipped_registry_bases_are_pinned():
    for name in ("cuda", "rocm"):
        base = read_base(name, ROOT)
        assert base.accelerator == name and re.fullmatch(r"sha256:[0-9a-f]{64}", base.digest or "")


def test_apptainer_itself_can_read_the_argument_files():
    """It knows no comments: a line without `=` is passed over, and one with it is an argument."""
    for file in (ROOT / "containers").glob("*.args"):
        keys = [line.partition("=")[0] for line in file.read_text().splitlines() if "=" in line]
        assert keys == ["BOOTSTRAP", "FROM", "ACCELERATOR"], file


def test_the_image_is_built_from_the_versions_of_the_lock():
    image = _pins(ROOT / "containers" / "image.lock")
    whole = _pins(ROOT / "containers" / "requirements.lock")
    assert {"torch", "deepspeed", "mlflow", "submitit"} <= image.keys()
    assert not {"pytest", "ruff", "mypy", "selenium", "transformers"} & image.keys()
    assert {name: versions for name, versions in image.items() if not versions <= whole[name]} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert {re.split(r"[^A-Za-z0-9._-]", name)[0].lower() for name in asked} - image.keys() == set()
    cuda = _pins(ROOT / "containers" / "cuda.lock")
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= cuda.keys()
    assert {name: cuda[name] for name in cuda.keys() & image.keys()} == {
        n: image[n] for n in cuda.keys() & image.keys()
    }


def _pins(file: Path) -> dict[str, set[str]]:
    pins: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", file.read_text(), flags=re.M):
        pins.setdefault(name, set()).add(version)
    return pins


def test_debootstrap_is_found_where_a_users_path_does_not_lead_and_a_mirror_that_is_given_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "mine.args"
    file.write_text("BOOTSTRAP=debootstrap\nFROM=debian:bookworm\nACCELERATOR=cpu\nMIRROR=http://mirror\n")
    monkeypatch.setenv("PATH", "/not/there")
    monkeypatch.setattr("pipeline.image.base._ADMIN_FOLDERS", (str(tmp_path / "sbin"),))
    with pytest.raises(UsageError, match="needs debootstrap, which is not installed here"):
        read_base(str(file), ROOT)
    (tmp_path / "sbin").mkdir()
    (tmp_path / "sbin" / "debootstrap").touch(mode=0o755)
    assert read_base(str(file), ROOT).arguments["MIRROR"] == "http://mirror"


# ---- wheels --------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip knows of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_wheels_are_fetched_once_for_a_lock_those_for_an_older_glibc_too(tmp_path: Path, index: Path):
    names = {_wheel(index, "torch", "2.13.0+cpu", NEWEST_GLIBC), _wheel(index, "library", "1.0", OLD_GLIBC)}
    lock, said = _lock(tmp_path, "torch==2.13.0", "library==1.0"), []
    house = wheelhouse("cpu", [lock], tmp_path / "wheels", said.append)
    assert {wheel.name for wheel in house.iterdir()} == names and said == ["fetching wheels"]

    shutil.rmtree(index)
    assert wheelhouse("cpu", [lock], tmp_path / "wheels", said.append) == house and len(said) == 1
    with pytest.raises(PipelineError, match=r"could not be fetched: .*torch==2\.14\.0"):
        wheelhouse("cpu", [_lock(tmp_path, "torch==2.14.0")], tmp_path / "wheels", said.append)
    assert list((tmp_path / "wheels").iterdir()) == [house]


def test_torch_for_something_else_is_refused_and_nothing_is_kept(tmp_path: Path, index: Path):
    _wheel(index, "torch", "2.13.0+cpu", NEWEST_GLIBC)
    with pytest.raises(UsageError, match=r"torch-2\.13\.0\+cpu.* is not built for cuda; point it at the index"):
        wheelhouse("cuda", [_lock(tmp_path, "torch==2.13.0")], tmp_path / "wheels", lambda what: None)
    assert list((tmp_path / "wheels").iterdir()) == []


def _lock(folder: Path, *pins: str) -> Path:
    file = folder / "image.lock"
    file.write_text("\n".join(pins) + "\n")
    return file


def _wheel(folder: Path, name: str, version: str, tag: str) -> str:
    """A wheel that holds nothing but what pip reads of it."""
    file, about = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{about}/RECORD", "")
    return file.name


# ---- the checkout --------------------------------------------------------------------------


def test_a_file_that_git_does_not_know_marks_the_image_as_not_of_the_commit(tmp_path: Path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "a.py").touch()
    assert commit_of(tmp_path) == "unknown"
    identity = ("-c", "user.name=n", "-c", "user.email=e")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "notes.txt").touch()  # no part of the image
    assert commit_of(tmp_path) == clean
    (tmp_path / "pipeline" / "b.py").touch()
    assert commit_of(tmp_path) == f"{clean}-dirty"


def test_a_checkout_that_cannot_be_written_is_one_message(tmp_path: Path, apptainer: Callable[..., list[str]]):
    checkout = tmp_path / "checkout"
    for name in ("pipeline", "containers"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Apptainer.def", checkout)
    (checkout / "build").touch()  # root can write where others cannot, but not into a file
    apptainer()
    archive = tmp_path / "base.tar"
    archive.touch()
    base = tmp_path / "mine.args"
    base.write_text(f"BOOTSTRAP=docker-archive\nFROM={archive}\nACCELERATOR=cpu\n")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "image", "build", "--base", str(base)],
        cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)}, capture_output=True, text=True,
    )  # fmt: skip
    message = (
        f"{checkout}/build/images: cannot be written (Not a directory); build from a clone in a folder of your own"
    )
    assert (done.returncode, done.stderr) == (2, f"pipeline: error: {message}\n")


# ---- Apptainer -----------------------------------------------------------------------------

STAGES = ["Starting build...", "Running post scriptlet", "Running testscript", "Creating SIF file..."]
TOLD = [
    "the packages are installed",
    "the image is tested: every module is imported, three steps are trained",
    "the image is packed",
]


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a build by an Apptainer that says what it is told to; returns the stages a person is told."""

    def run(*said: str, status: int = 0) -> list[str]:
        (tmp_path / "said").write_text("".join(f"{line}\n" for line in said))
        program = tmp_path / "bin" / "apptainer"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "$APPTAINER_BIND $*"; cat {tmp_path}/said; exit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
        told: list[str] = []
        arguments = {"BOOTSTRAP": "docker", "FROM": "debian@sha256:0"}
        build(Path("a.def"), Path("a.sif"), arguments, "/w:/mnt:ro", tmp_path / "log", sandbox=False, say=told.append)
        return told

    return run


def test_the_stages_of_a_build_are_told_and_its_words_are_kept(tmp_path: Path, apptainer: Callable[..., list[str]]):
    assert apptainer(*(f"INFO:    {stage}" for stage in STAGES)) == TOLD
    first, *others = (tmp_path / "log").read_text().splitlines()
    assert first == (
        "/w:/mnt:ro build --mksquashfs-args -comp zstd -Xcompression-level 1 --build-arg BOOTSTRAP=docker "
        "--build-arg FROM=debian@sha256:0 a.sif a.def"
    )
    assert others == [f"INFO:    {stage}" for stage in STAGES]


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("E: Cannot install into target '/x' mounted with noexec or nodev", "take a base from a registry"),
        ("FATAL: http: server gave HTTP response to HTTPS client", "export APPTAINER_NOHTTPS=1"),
        ("Write failed because No space left on device", "export APPTAINER_TMPDIR=DIR on a larger disk"),
        ("FATAL: Requesting capability set 0x3 while 0x1", "export APPTAINER_DROP_CAPS"),
    ],
)
def test_a_build_that_fails_ends_with_its_last_words_and_the_cure(
    tmp_path: Path, apptainer: Callable[..., list[str]], said: str, cure: str
):
    with pytest.raises(PipelineError) as failed:
        apptainer(*(f"line {n}" for n in range(40)), said, status=255)
    first, *others = str(failed.value).splitlines()
    assert first == f"apptainer could not build the image; the end of {tmp_path}/log:"
    assert others[0].strip() == "line 26" and others[14].strip() == said and cure in others[15]
