"""What is in the image, what its record says, and what is said about images that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.files import sha256_file
from pipeline.launch.container import container_environment
from pipeline.launch.image import check_image
from pipeline.launch.image_build import commit_of
from pipeline.launch.image_record import read_record
from pipeline.launch.site import SiteContainer
from tests.container.support import ROOT, Jobs
from tests.test_cli import pipeline

pytestmark = pytest.mark.container


def test_the_image_tested_itself_when_it_was_built(image: Path):
    log = image.with_name(f"{image.name}.log").read_text()
    assert "step 3/3" in log and "three steps: well" in log


def test_the_record_is_true_and_info_finds_a_changed_image(image: Path, tmp_path: Path):
    record = read_record(image)
    assert record["sha256"] == sha256_file(image)
    assert record["lock_sha256"] == sha256_file(ROOT / "containers" / "image.lock")
    assert record["base"]["bootstrap"] == "debootstrap" and record["base"]["digest"].startswith("sha256:")
    pins = [line for line in (ROOT / "containers" / "image.lock").read_text().splitlines() if "==" in line]
    built = {line.partition("+")[0] for line in record["python_packages"]}
    assert {_normal(p) for p in pins} - {_normal(b) for b in built} == set()

    done = pipeline("image", "info", str(image))
    assert done.returncode == 0, done.stderr
    assert record["sha256"] in done.stdout and "the image is what its record says" in done.stdout
    assert ("commit of this checkout is another" in done.stdout) == (record["commit"] != commit_of(ROOT))

    changed = tmp_path / image.name
    shutil.copy(image, changed)
    shutil.copy(image.with_name(f"{image.name}.json"), tmp_path)
    with changed.open("ab") as file:
        file.write(b"\0")
    done = pipeline("image", "info", str(changed))
    assert done.returncode == 1 and "it was changed or damaged after it was built" in done.stderr


def test_labels_name_version_commit_base_and_lock(image: Path):
    done = subprocess.run(["apptainer", "inspect", "--json", str(image)], capture_output=True, text=True, check=True)
    labels, record = json.loads(done.stdout)["data"]["attributes"]["labels"], read_record(image)
    assert labels["org.opencontainers.image.version"] == record["version"]
    assert labels["org.opencontainers.image.revision"] == record["commit"]
    assert labels["org.opencontainers.image.base.name"] == record["base"]["name"]
    assert labels["pipeline.lock.sha256"] == record["lock_sha256"]


def test_the_image_holds_no_daemon_no_users_no_secrets_and_no_caches(image: Path):
    inside = _files(image)
    assert not [name for name in inside if name.endswith(("/sshd", "/pip", "/.npmrc", "/pip.conf", "/.git"))]
    assert not [name for name in inside if name.startswith(("/root/.", "/home/", "/var/lib/apt/lists/"))
                and name not in ("/root/.bashrc", "/root/.profile")]  # fmt: skip
    assert not [name for name in inside if name.startswith("/var/cache/apt/archives/") and name.endswith(".deb")]
    for development in ("pytest", "ruff", "mypy", "selenium"):
        assert not [name for name in inside if f"/site-packages/{development}/" in name]
    users = _inside(image, "cat", "/etc/passwd").splitlines()
    assert not [user for user in users if 1000 <= int(user.split(":")[2]) < 60000]


@pytest.mark.parametrize("kind", ["inherit", "clean"])
def test_what_the_job_says_wins_over_the_defaults_of_the_image(jobs: Jobs, kind: str):
    show = ("sh", "-c", "echo $NCCL_DEBUG $OMP_NUM_THREADS $PYTHONNOUSERSITE $SLURM_JOB_NODELIST ${EDITOR-none}")
    argv = jobs.argv("variables", *show, overrides=(f"container.environment={kind}",))
    around = {k: v for k, v in os.environ.items() if not k.startswith("NCCL_")} | {"EDITOR": "vi"}

    def seen(**more: str) -> list[str]:
        environment = container_environment(SiteContainer(), {**around, **more})
        return subprocess.run(argv, capture_output=True, text=True, check=True, env=environment).stdout.split()

    editor = "vi" if kind == "inherit" else "none"
    assert seen() == ["WARN", "1", "1", editor]
    assert seen(NCCL_DEBUG="INFO", SLURM_JOB_NODELIST="n[1,3]") == ["INFO", "1", "1", "n[1,3]", editor]


def test_the_image_runs_as_the_command_pipeline(image: Path):
    done = subprocess.run(["apptainer", "run", str(image), "train", "no.yaml"], capture_output=True, text=True)
    assert done.returncode == 2 and "no.yaml: the config file cannot be read" in done.stderr
    done = subprocess.run(["apptainer", "run-help", str(image)], capture_output=True, text=True)
    assert "pipeline submit" in done.stdout


def test_only_what_the_config_names_is_seen_inside(jobs: Jobs):
    probe = (
        f"ls {jobs.text}/train | wc -l; test -w . && test -w runs/seen && echo writable;"
        f"touch {jobs.text}/x 2>/dev/null || echo read-only text; test -e {ROOT}/Makefile || echo no checkout;"
        "ls -d ~/.bash_history ~/.ssh ~/.cache ~/.config 2>/dev/null || echo no home; pwd"
    )
    done = subprocess.run(jobs.argv("seen", "sh", "-c", probe), capture_output=True, text=True)
    count = len(list((jobs.text / "train").iterdir()))
    expected = [str(count), "writable", "read-only text", "no checkout", "no home", str(jobs.folder)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_an_image_that_can_be_used_is_no_problem_and_one_without_the_package_is(jobs: Jobs, tmp_path: Path):
    assert check_image(jobs.config("checked"), SiteContainer()) == []
    bare = _bare_sandbox(tmp_path / "bare")
    [problem] = check_image(jobs.config("checked", f"container.image={bare}"), SiteContainer())
    assert problem == f"container.image: {bare} holds no command `pipeline`; build an image with `pipeline image build`"


def test_a_damaged_image_is_named_with_what_the_runtime_says(jobs: Jobs, tmp_path: Path):
    torn = tmp_path / "torn.sif"
    with jobs.image.open("rb") as whole:
        torn.write_bytes(whole.read(100_000))
    [problem] = check_image(jobs.config("checked", f"container.image={torn}"), SiteContainer())
    assert problem.startswith(f"container.image: {torn} cannot be started by apptainer: ")


def _bare_sandbox(folder: Path) -> Path:
    """A sandbox that can be started and holds a shell and nothing else."""
    for name in (".singularity.d", "bin", "etc", "tmp", "var/tmp", "proc", "sys", "dev", "root"):
        (folder / name).mkdir(parents=True)
    shell = Path("/bin/dash")
    shutil.copy(shell, folder / "bin" / "sh")
    listed = subprocess.run(["ldd", str(shell)], capture_output=True, text=True, check=True).stdout
    for library in (Path(word) for word in listed.split() if word.startswith("/")):
        (folder / str(library.parent)[1:]).mkdir(parents=True, exist_ok=True)
        shutil.copy(library, folder / str(library)[1:])
    return folder


def _inside(image: Path, *command: str) -> str:
    argv = ["apptainer", "exec", "--containall", str(image), *command]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _files(image: Path) -> list[str]:
    """Every file and folder of the image itself, nothing of the host's."""
    command = ("find", "/", "-xdev", "-not", "-path", "/proc/*", "-print")
    return _inside(image, *command).splitlines()


def _normal(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{name.lower().replace('_', '-').replace('.', '-')}=={version.partition('+')[0]}"
