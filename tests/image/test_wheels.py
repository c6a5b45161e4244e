"""The wheels of an image: fetched once per lock, for the right accelerator, and only of this project's package."""

from __future__ import annotations

import platform
import re
import shutil
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from setuptools import find_packages

from pipeline.errors import PipelineError, UsageError
from pipeline.image.base import Base
from pipeline.image.wheels import PROJECT_PARTS, locks_of, wheelhouse
from tests.cli.test_main import ROOT

MACHINE = platform.machine()
# NVIDIA's wheels are for this one alone; Debian 12 has a newer glibc.
OLD_GLIBC = f"py3-none-manylinux_2_27_{MACHINE}"
CPU = Base("cpu", {"ACCELERATOR": "cpu"}, None)
NEWEST_GLIBC = f"cp311-cp311-manylinux_2_28_{MACHINE}"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_locks_of_the_images_pin_the_versions_of_the_project(machine: str):
    image = _pins(ROOT / "containers" / machine / "image.lock")
    whole = _pins(ROOT / "containers" / "requirements.lock")
    assert {"torch", "deepspeed", "mlflow", "submitit"} <= image.keys()
    assert not {"pytest", "ruff", "mypy", "selenium", "transformers"} & image.keys()
    assert {name: versions for name, versions in image.items() if not versions <= whole[name]} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    assert {re.split(r"[^A-Za-z0-9._-]", name)[0].lower() for name in asked} - image.keys() == set()
    cuda = _pins(ROOT / "containers" / machine / "cuda.lock")
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= cuda.keys()
    assert {name: cuda[name] for name in cuda.keys() & image.keys()} == {
        n: image[n] for n in cuda.keys() & image.keys()
    }


def _pins(file: Path) -> dict[str, set[str]]:
    pins: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", file.read_text(), flags=re.M):
        pins.setdefault(name, set()).add(version)
    return pins


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only source of packages for pip."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_wheels_are_fetched_once_per_lock_including_those_for_an_older_glibc(tmp_path: Path, index: Path):
    names = {_wheel(index, "torch", "2.13.0+cpu", NEWEST_GLIBC), _wheel(index, "library", "1.0", OLD_GLIBC)}
    lock, said = _lock(tmp_path, "torch==2.13.0", "library==1.0"), []
    house = wheelhouse(CPU, [lock], tmp_path / "wheels", said.append)
    assert {wheel.name for wheel in house.iterdir()} == names and said == ["fetching wheels"]

    shutil.rmtree(index)
    assert wheelhouse(CPU, [lock], tmp_path / "wheels", said.append) == house and len(said) == 1
    with pytest.raises(PipelineError, match=r"wheels .*torch==2\.14\.0"):
        wheelhouse(CPU, [_lock(tmp_path, "torch==2.14.0")], tmp_path / "wheels", said.append)
    assert list((tmp_path / "wheels").iterdir()) == [house]


def test_torch_for_another_accelerator_is_refused_and_nothing_is_kept(tmp_path: Path, index: Path):
    _wheel(index, "torch", "2.13.0+cpu", NEWEST_GLIBC)
    with pytest.raises(UsageError, match=r"torch-2\.13\.0\+cpu.* cuda.*PIP_EXTRA_INDEX_URL"):
        wheelhouse(
            replace(CPU, arguments={"ACCELERATOR": "cuda"}),
            [_lock(tmp_path, "torch==2.13.0")],
            tmp_path / "wheels",
            lambda what: None,
        )
    assert list((tmp_path / "wheels").iterdir()) == []


def test_a_base_with_its_own_torch_gets_the_rest_for_its_python(tmp_path: Path, index: Path):
    _wheel(index, "library", "1.0", OLD_GLIBC)
    own = _wheel(index, "compiled", "2.0", f"cp312-cp312-manylinux_2_28_{MACHINE}")
    base = replace(CPU, arguments={"ACCELERATOR": "cuda", "TORCH": "base", "PYTHON": "3.12"})
    lock = _lock(tmp_path, "compiled==2.0", "library==1.0", "torch==2.13.0")
    house = wheelhouse(base, [lock], tmp_path / "wheels", lambda what: None)
    assert {wheel.name for wheel in house.iterdir()} == {own, f"library-1.0-{OLD_GLIBC}.whl"}
    with pytest.raises(PipelineError, match="compiled"):
        wheelhouse(CPU, [lock], tmp_path / "wheels", lambda what: None)


def _lock(folder: Path, *pins: str) -> Path:
    file = folder / "image.lock"
    file.write_text("\n".join(pins) + "\n")
    return file


def _wheel(folder: Path, name: str, version: str, tag: str) -> str:
    """Writes a wheel of only the files that pip reads."""
    file, about = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        wheel.writestr(f"{about}/RECORD", "")
    return file.name


def test_the_projects_wheel_installs_the_package_pipeline_and_nothing_else():
    """Asks setuptools for what it would pack; `project_wheel` copies exactly these parts of a checkout."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = find_packages(str(ROOT), **tool["packages"]["find"])
    assert {name.partition(".")[0] for name in packages} == {"pipeline"}
    assert {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in _folders_with_code()} == set(packages)
    data = {path for pattern in tool["package-data"]["pipeline"] for path in (ROOT / "pipeline").glob(pattern)}
    beside = {f for f in (ROOT / "pipeline").rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")}
    assert {path for path in data if "examples" not in path.parts} == beside  # links: tests/commands/test_new.py
    assert {path.name for path in data} >= {"install.sh", "slurm.conf", "client.sh"}
    assert [part for part in PROJECT_PARTS if not (ROOT / part).exists()] == []


def _folders_with_code() -> set[Path]:
    return {file.parent for file in (ROOT / "pipeline").rglob("*.py")}


def test_an_accelerator_without_a_lock_of_its_own_uses_the_common_one():
    for machine in ("x86_64", "aarch64"):
        own = ROOT / "containers" / machine
        assert locks_of("cpu", ROOT / "containers", machine) == [own / "image.lock"]
        assert locks_of("cuda", ROOT / "containers", machine) == [own / "image.lock", own / "cuda.lock"]


def test_a_lock_for_another_machine_is_refused_by_name(tmp_path: Path):
    shutil.copytree(ROOT / "containers", tmp_path / "containers")
    with pytest.raises(UsageError, match=r"no lock for riscv64, only for aarch64 and x86_64.*make lock"):
        locks_of("cpu", tmp_path / "containers", "riscv64")
    wrong = tmp_path / "containers/aarch64/cuda.lock"
    shutil.copy(ROOT / "containers/x86_64/cuda.lock", wrong)
    with pytest.raises(UsageError, match=rf"{wrong}: was resolved for x86_64, and this is aarch64"):
        locks_of("cuda", tmp_path / "containers", "aarch64")
