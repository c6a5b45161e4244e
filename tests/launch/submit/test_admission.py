"""What is refused before anything is queued: images that no job could use, or that a run was not trained in."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.run.folder import Run
from tests.launch.container.support import HERE, OTHER_ARCHITECTURE, sif
from tests.launch.support import ROOT, SITE, FakeSlurm, submit, write_files

# A runtime that finds the command `pipeline` in any image, and one that finds it in none.
APPTAINERS = {"whole": "#!/bin/sh\n", "bare": "#!/bin/sh\nexit 127\n"}
# One that starts an image only if it may unpack it, as on nodes where /dev/fuse is closed, and one that never does.
FUSE = "echo 'FATAL:   squashfuse_ll mount: fuse: failed to open /dev/fuse: Permission denied' >&2; exit 255"
CLOSED = {
    "unpacks": f"#!/bin/sh\ncase \" $* \" in *' --unsquash '*) exit 0;; esac\n{FUSE}\n",
    "never": f"#!/bin/sh\n{FUSE}\n",
}
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
# What is wrong: the image, the runtime, the place that is named, and a word of the reason.
IMAGES = {
    "missing": (None, "whole", "container.image: {image} ", "does not exist"),
    "damaged": (b"no image", "whole", "container.image: {image} ", "damaged"),
    "of another machine": (OTHER_ARCHITECTURE, "whole", "container.image: {image} ", f"is {MACHINE};"),
    "without the package": (HERE, "bare", "container.image: {image} ", "no command `pipeline`"),
    "without a runtime": (HERE, None, "container.command: '{command}' ", f"on {socket.gethostname()};"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", IMAGES)
def test_an_image_that_no_job_could_use_is_refused_before_anything_is_queued(
    tmp_path: Path, slurm: FakeSlurm, kind: str
):
    image, runtime, place, word = IMAGES[kind]
    site = _contained(tmp_path, slurm, image, runtime)
    write_files(tmp_path, site=site)
    done = submit(tmp_path, slurm, "container.image=image.sif")
    named = place.format(image=tmp_path / "image.sif", command=slurm.folder / "apptainer")
    assert done.status == 2 and done.err.startswith(f"pipeline: error: {named}") and word in done.err
    assert not slurm.calls("sbatch") and not (tmp_path / "runs").exists()


def test_an_image_is_started_as_the_jobs_will_start_it(tmp_path: Path, slurm: FakeSlurm):
    site = _contained(tmp_path, slurm, HERE, "whole")
    command = Path(site["container"]["command"])
    command.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/said\n')
    write_files(tmp_path, site={**site, "container": {**site["container"], "unsquash": True, "options": ["--userns"]}})
    assert submit(tmp_path, slurm, "container.image=image.sif").status == 0
    said = (tmp_path / "said").read_text()
    assert said.startswith(f"exec --no-eval --no-mount home,cwd --pid --unsquash --userns {tmp_path}/image.sif sh -c")


@pytest.mark.parametrize(
    ("runtime", "unsquash", "words"),
    [
        ("unpacks", False, "set `container.unsquash: true`"),
        ("unpacks", True, None),
        ("never", True, "`container.unsquash` is already set\n"),
    ],
)
def test_where_fuse_is_closed_the_cure_that_is_named_is_one(
    tmp_path: Path, slurm: FakeSlurm, runtime: str, unsquash: bool, words: str | None
):
    site = _contained(tmp_path, slurm, HERE, "whole")
    Path(site["container"]["command"]).write_text(CLOSED[runtime])
    write_files(tmp_path, site={**site, "container": {**site["container"], "unsquash": unsquash}})
    done = submit(tmp_path, slurm, "container.image=image.sif")
    assert done.status == (2 if words else 0), done.err
    assert (words or "") in done.err


def test_a_path_that_no_job_would_see_is_refused_before_anything_is_queued(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path, site=_contained(tmp_path, slurm, HERE, "whole"))
    (tmp_path / "text" / "a.txt").unlink()
    (tmp_path / "text" / "a.txt").symlink_to("/etc/passwd")
    done = submit(tmp_path, slurm, "container.image=image.sif")
    message = (
        "the jobs could not see everything in their container:\n"
        "  data.sources.0.paths: text/a.txt is a link to /etc/passwd, which a job in the container does not see; add "
        "/etc to container.binds"
    )
    assert (done.status, done.err) == (2, f"pipeline: error: {message}\n")
    assert not slurm.calls("sbatch") and not (tmp_path / "runs").exists()


def test_a_runtime_that_the_job_loads_need_not_be_here_and_the_file_is_judged_all_the_same(
    tmp_path: Path, slurm: FakeSlurm
):
    site = {**_contained(tmp_path, slurm, HERE, None), "modules": ["apptainer"]}
    write_files(tmp_path, site=site)
    assert submit(tmp_path, slurm, "container.image=image.sif").status == 0
    done = submit(tmp_path, slurm, "name=other", "container.image=not-there.sif")
    assert done.status == 2 and "does not exist" in done.err


def test_another_image_than_the_runs_is_refused_until_it_is_allowed(tmp_path: Path, slurm: FakeSlurm, monkeypatch):
    write_files(tmp_path, site=_contained(tmp_path, slurm, HERE, "whole"))
    monkeypatch.chdir(tmp_path)
    run = Run(Path("runs/tiny"))
    run.path.mkdir(parents=True)
    run.add_provenance({"image": {"path": "/images/before.sif", "sha256": "a" * 64, "code": "image"}})
    done = submit(tmp_path, slurm, "container.image=image.sif")
    assert done.status == 2 and not slurm.calls("sbatch")
    assert "/images/before.sif" in done.err and "--allow-image-change" in done.err

    done = submit(tmp_path, slurm, "container.image=image.sif", "--allow-image-change")
    assert done.status == 0, done.err
    [task] = json.loads((run.launch / "train.json").read_text())["tasks"]
    assert task["commands"] == [["train", str(run.config_file), "--take-over", "--allow-image-change"]]


def test_a_node_without_the_runtime_is_one_message_in_the_log_of_the_rank(tmp_path: Path, slurm: FakeSlurm):
    site = {**_contained(tmp_path, slurm, HERE, None), "modules": ["apptainer"]}
    write_files(tmp_path, site=site)
    assert submit(tmp_path, slurm, "container.image=image.sif").status == 0
    rank = {
        "SLURM_JOB_ID": "102",
        "SLURM_PROCID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.launch.job import rank; rank.run_rank('runs/tiny/launch/train.json')"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **rank}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr == ""
    [log] = (tmp_path / "runs" / "tiny" / "logs").rglob("*rank_0.log")
    [line] = log.read_text().splitlines()
    assert line.startswith("pipeline: error: container.command: ") and "load its module (`modules`" in line


def _contained(folder: Path, slurm: FakeSlurm, image: bytes | None, runtime: str | None) -> dict[str, Any]:
    """A site whose Apptainer is a script; `image.sif` has the given content, or is not there."""
    if image in (HERE, OTHER_ARCHITECTURE):
        sif(folder / "image.sif", image)
    elif image is not None:
        (folder / "image.sif").write_bytes(image)
    command = slurm.folder / "apptainer"
    if runtime is not None:
        command.write_text(APPTAINERS[runtime])
        command.chmod(0o755)
    return {**SITE, "container": {"command": str(command)}}
