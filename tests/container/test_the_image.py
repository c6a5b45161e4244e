"""The contents of the image, its record, and the messages about images that cannot be used."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.files import sha256_file
from pipeline.image.build import commit_of
from pipeline.image.compare import Comparison, compare, print_comparison
from pipeline.image.record import digest, read_record, write_record
from pipeline.launch.container.command import container_environment
from pipeline.launch.container.image import check_image
from pipeline.launch.site import SiteContainer
from tests.cli.test_main import pipeline
from tests.container.support import ROOT, Jobs

LOCK = ROOT / "containers" / platform.machine() / "image.lock"

# The first test that needs the image builds it.
pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


def test_the_image_tested_itself_when_it_was_built(image: Path):
    log = image.with_name(f"{image.name}.log").read_text()
    assert "step 3/3" in log and "three steps: ok" in log


def test_the_record_is_true_and_info_finds_a_changed_image(image: Path, tmp_path: Path):
    record = read_record(image)
    assert record["sha256"] == sha256_file(image)
    assert record["lock_sha256"] == sha256_file(LOCK)
    assert record["base"]["bootstrap"] == "debootstrap" and record["base"]["digest"].startswith("sha256:")
    pins = [line for line in (LOCK).read_text().splitlines() if "==" in line]
    built = {line.partition("+")[0] for line in record["python_packages"]}
    assert {_normal(p) for p in pins} - {_normal(b) for b in built} == set()

    done = pipeline("image", "info", str(image))
    assert done.returncode == 0, done.stderr
    assert record["sha256"] in done.stdout and "matches its record" in done.stdout
    assert ("checkout differs" in done.stdout) == (record["commit"] != commit_of(ROOT))

    changed = tmp_path / image.name
    shutil.copy(image, changed)
    shutil.copy(image.with_name(f"{image.name}.json"), tmp_path)
    with changed.open("ab") as file:
        file.write(b"\0")
    done = pipeline("image", "info", str(changed))
    assert done.returncode == 1 and "changed, signed or damaged" in done.stderr


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
def test_variables_of_the_job_override_the_defaults_of_the_image(jobs: Jobs, kind: str):
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
    assert done.returncode == 2 and "no.yaml (here " in done.stderr
    done = subprocess.run(["apptainer", "run-help", str(image)], capture_output=True, text=True)
    assert "pipeline submit" in done.stdout


def test_a_job_sees_only_what_the_config_names(jobs: Jobs):
    probe = (
        f"ls {jobs.text}/train | wc -l; test -w . && test -w runs/seen && echo writable;"
        f"touch {jobs.text}/x 2>/dev/null || echo read-only text; test -e {ROOT}/Makefile || echo no checkout;"
        "ls -d ~/.bash_history ~/.ssh ~/.cache ~/.config 2>/dev/null || echo no home; pwd"
    )
    done = subprocess.run(jobs.argv("seen", "sh", "-c", probe), capture_output=True, text=True)
    count = len(list((jobs.text / "train").iterdir()))
    expected = [str(count), "writable", "read-only text", "no checkout", "no home", str(jobs.folder)]
    assert done.stdout.splitlines() == expected, done.stderr


def test_an_image_without_the_package_is_a_problem_and_the_built_one_is_not(jobs: Jobs, tmp_path: Path):
    assert check_image(jobs.config("checked"), SiteContainer()) == []
    bare = _bare_sandbox(tmp_path / "bare")
    [problem] = check_image(jobs.config("checked", f"container.image={bare}"), SiteContainer())
    assert problem.startswith(f"container.image: {bare} ") and "no command `pipeline`" in problem


def test_a_damaged_image_is_named_with_the_message_of_the_runtime(jobs: Jobs, tmp_path: Path):
    torn = tmp_path / "torn.sif"
    with jobs.image.open("rb") as whole:
        torn.write_bytes(whole.read(100_000))
    [problem] = check_image(jobs.config("checked", f"container.image={torn}"), SiteContainer())
    assert problem.startswith(f"container.image: {torn} ") and "apptainer" in problem


def test_pipeline_check_runs_the_checks_of_the_node_inside_the_image(jobs: Jobs, tmp_path: Path):
    program = tmp_path / "apptainer"
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/calls\nexec {shutil.which("apptainer")} "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", *jobs.command("checked", "check", "--json", "container.code=image")],
        cwd=jobs.folder, env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)}
    inside = ("torch", "deepspeed", "devices", "writable runs", "clock", "/dev/shm", "open files", "locked memory")
    assert {name: found[name]["status"] == "failed" for name in inside} == dict.fromkeys(inside, False)
    [inner] = [call for call in (tmp_path / "calls").read_text().splitlines() if "check.node" in call]
    assert f"{jobs.image} python3 -m pipeline.check.node runs" in inner
    assert not jobs.run("checked").path.exists()


def test_the_signature_of_an_image_is_valid_until_the_image_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("APPTAINER_KEYSDIR", str(tmp_path / "keys"))
    (tmp_path / "keys").mkdir(mode=0o700)
    image = tmp_path / "signed.sif"
    subprocess.run(["apptainer", "build", image, _bare_sandbox(tmp_path / "bare")], capture_output=True, check=True)
    write_record(image, {"commit": "a"})
    key = ("--name=builder", "--email=builder@example.org", "--comment=", "--password=phrase", "--push=false")
    subprocess.run(["apptainer", "key", "newpair", *key], capture_output=True, check=True)
    subprocess.run(["apptainer", "sign", image], input="phrase\n", capture_output=True, text=True, check=True)

    def verify() -> int:
        return subprocess.run(["apptainer", "verify", "--local", image], capture_output=True).returncode

    assert verify() == 0
    assert digest(image) != read_record(image)["sha256"]
    with image.open("r+b") as file:
        file.seek(image.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert verify() != 0


def test_a_comparison_names_every_file_and_package_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = [_bare_sandbox(tmp_path / name) for name in ("first", "second")]
    for image in images:
        _with_tools(image)
        write_record(image, {"python_packages": ["torch==2.13.0"], "system_packages": ["libc6=2.36"]})
    assert print_comparison(*images)
    assert capsys.readouterr().out.startswith(
        "packages      the same\nfiles         the same\ncontents      the same\n"
    )

    (images[1] / "etc" / "same").write_text("two")
    (images[0] / "etc" / "same").write_text("one")
    assert print_comparison(*images) and "contents      1 differ\n  /etc/same\n" in capsys.readouterr().out
    (images[1] / "etc" / "more").symlink_to("same")
    write_record(images[1], {"python_packages": ["torch==2.14.0"], "system_packages": ["libc6=2.36"]})
    assert compare(*images) == Comparison(
        packages=[f"torch==2.13.0: in {images[0]} only", f"torch==2.14.0: in {images[1]} only"],
        listed=[f"/etc/more l 777 same: in {images[1]} only"],
        contents=["/etc/same"],
        files=compare(*images).files,
    )
    assert not print_comparison(*images)


def _with_tools(sandbox: Path) -> None:
    """Adds the programs that a comparison runs inside an image."""
    for name in ("find", "sha256sum"):
        _add_program(sandbox, Path(f"/usr/bin/{name}"), f"bin/{name}")


def _bare_sandbox(folder: Path) -> Path:
    """Creates a sandbox that can be started and holds only a shell."""
    for name in (".singularity.d", "bin", "etc", "tmp", "var/tmp", "proc", "sys", "dev", "root"):
        (folder / name).mkdir(parents=True)
    _add_program(folder, Path("/bin/dash"), "bin/sh")
    return folder


def _add_program(sandbox: Path, program: Path, name: str) -> None:
    shutil.copy(program, sandbox / name)
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    for library in (Path(word) for word in listed.split() if word.startswith("/")):
        (sandbox / str(library.parent)[1:]).mkdir(parents=True, exist_ok=True)
        shutil.copy(library, sandbox / str(library)[1:])


def _inside(image: Path, *command: str) -> str:
    argv = ["apptainer", "exec", "--containall", str(image), *command]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def _files(image: Path) -> list[str]:
    """Returns every file and folder of the image itself, none of the host."""
    command = ("find", "/", "-xdev", "-not", "-path", "/proc/*", "-print")
    return _inside(image, *command).splitlines()


def _normal(pin: str) -> str:
    name, _, version = pin.partition("==")
    return f"{name.lower().replace('_', '-').replace('.', '-')}=={version.partition('+')[0]}"
