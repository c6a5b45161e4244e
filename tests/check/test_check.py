"""`pipeline check` finds before a submission what would make the run fail after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from pipeline.check.check import _disk as disk_check
from pipeline.check.check import _parent as parent_check
from pipeline.check.result import Check
from pipeline.checkpoint.layout import Manifest
from pipeline.cli.main import main
from pipeline.config.init_section import InitConfig
from pipeline.data.build.build import prepare
from pipeline.run.folder import run_for, step_name
from tests.launch.support import CONFIG, ROOT, SITE, FakeSlurm, make_run, write_files


class Checking(Protocol):
    """Runs `pipeline check config.yaml` in the test's folder; returns its exit status and the checks by name."""

    def __call__(self, *args: str, slurm: FakeSlurm | None = None) -> tuple[int, dict[str, dict[str, Any]]]: ...


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Checking:
    """The command in this process; only what it starts itself is a process."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str, slurm: FakeSlurm | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
        if slurm is not None:
            monkeypatch.setenv("PATH", slurm.path)
        monkeypatch.setattr(sys, "argv", ["pipeline", "check", "config.yaml", *args, "--json"])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert err == "", err
        assert isinstance(end.value.code, int)
        return end.value.code, {one["name"]: one for one in json.loads(out)}

    return run


def with_site(**train: Any) -> dict[str, Any]:
    return {**SITE, "train": {**SITE["train"], **train}}


def test_a_config_that_works_on_this_machine_passes_every_check(tmp_path: Path, check: Checking):
    write_files(tmp_path)
    status, found = check()
    assert status == 0
    assert {one["status"] for one in found.values()} <= {"ok", "warning"}
    assert found["torch"]["found"].startswith("2.") and found["deepspeed"]["status"] == "ok"
    assert "1 files" in found["data"]["found"]


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python of the jobs that needs no seconds to import torch: it prints the results of its node at once."""
    return program(
        tmp_path / "python", """echo '[{"name": "torch", "status": "ok", "found": "of the site", "cure": ""}]'"""
    )


def program(file: Path, script: str) -> str:
    """Writes a shell script and returns its path."""
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return str(file)


def test_a_site_that_grants_the_request_passes_and_its_python_is_asked_for_torch(
    tmp_path: Path, check: Checking, cluster: FakeSlurm, python: str
):
    write_files(tmp_path, site={**SITE, "python": python})
    status, found = check("--site", "site.yaml", slurm=cluster)
    assert status == 0
    assert "main: 2 of 4" in found["request of train"]["found"]
    assert {found[name]["status"] for name in ("time limit", "accounting")} == {"ok"}
    assert found["torch"]["found"] == "of the site"


def without_torch(folder: Path) -> str:
    """A Python without the packages that training imports, as on a login node."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'deepspeed')))"
    run = "import runpy; sys.argv = sys.argv[1:]; runpy.run_module('pipeline.check.node', run_name='__main__')"
    return program(folder / "bare-python", f'shift 2\nexec {sys.executable} -c "{blocked}; {run}" node "$@"')


@pytest.mark.parametrize(
    ("script", "word"),
    [("echo no module >&2; exit 1", "no module"), ("exit 3", "exit status 3"), ("echo '{'", "exit status 0")],
)
def test_a_python_that_cannot_run_the_checks_is_one_failed_check(
    tmp_path: Path, check: Checking, cluster: FakeSlurm, script: str, word: str
):
    write_files(tmp_path, site={**SITE, "python": program(tmp_path / "python", script)})
    status, found = check("--site", "site.yaml", slurm=cluster)
    assert (status, found["node"]["status"]) == (1, "failed") and word in found["node"]["found"]
    assert f"{tmp_path}/python -m pipeline.check.node" in found["node"]["cure"]


@pytest.mark.parametrize(("modules", "expected"), [([], (1, "failed")), (["pytorch"], (0, "warning"))])
def test_a_login_node_without_torch_is_judged_by_what_the_jobs_load(
    tmp_path: Path, check: Checking, cluster: FakeSlurm, modules: list[str], expected: tuple[int, str]
):
    write_files(tmp_path, site={**SITE, "python": without_torch(tmp_path), "modules": modules})
    status, found = check("--site", "site.yaml", slurm=cluster)
    assert (status, found["torch"]["status"]) == expected
    assert ("modules" in found["torch"]["cure"]) == bool(modules)
    assert ("`python` of" in found["torch"]["cure"]) != bool(modules)


def test_a_model_that_does_not_fit_is_refused_with_the_cure(
    tmp_path: Path, check: Checking, cluster: FakeSlurm, python: str
):
    write_files(tmp_path, site={**with_site(mem_gb=0.5), "python": python})
    model = ["model.d_model=2048", "model.d_ff=8192", "model.num_layers=24"]
    status, found = check("--site", "site.yaml", *model, slurm=cluster)
    assert status == 1
    assert found["memory"]["status"] == "failed" and "train.zero_stage" in found["memory"]["cure"]


@pytest.mark.parametrize(
    ("gpus", "overrides", "warned"),
    [
        (2, [], True),
        (2, ["train.zero_stage=1"], False),
        (2, ["train.device=cpu"], False),
        (0, [], False),
    ],
)
def test_stage_0_on_several_gpus_is_a_warning_that_names_the_better_stages(
    tmp_path: Path, check: Checking, cluster: FakeSlurm, python: str, gpus: int, overrides: list[str], warned: bool
):
    write_files(tmp_path, site={**with_site(nodes=2, tasks_per_node=2, gpus_per_node=gpus), "python": python})
    _, found = check("--site", "site.yaml", *overrides, slurm=cluster)
    assert ("zero stage" in found) == warned
    if warned:
        assert found["zero stage"]["status"] == "warning" and "4 GPUs" in found["zero stage"]["found"]
        assert "train.zero_stage=1" in found["zero stage"]["cure"]


@pytest.mark.parametrize(
    ("gpu_type", "reported", "overrides", "warned"),
    [
        ("v100", "", ["train.precision=bf16"], True),
        ("v100", "", ["train.precision=fp32"], False),
        ("a100", "", ["train.precision=bf16"], False),
        (None, "2 x Tesla V100-SXM2-32GB", ["train.precision=bf16"], True),
        (None, "2 x Tesla V100-SXM2-32GB", ["train.precision=bf16", "train.device=cpu"], False),
        (None, "no GPU, 2 CPU cores", ["train.precision=bf16"], False),
    ],
)
def test_a_precision_that_the_gpu_lacks_is_a_warning(
    tmp_path: Path, check: Checking, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch, gpu_type: str | None,
    reported: str, overrides: list[str], warned: bool,
):  # fmt: skip
    write_files(tmp_path, site={**with_site(tasks_per_node=1, gpus_per_node=1), "gpu_type": gpu_type})
    monkeypatch.setattr("pipeline.check.check._node", lambda *_: [Check("devices", "ok", reported)])
    arguments = [*overrides, *(["--site", "site.yaml"] if gpu_type else [])]
    _, found = check(*arguments, slurm=cluster if gpu_type else None)
    assert ("precision" in found) == warned
    if warned:
        assert found["precision"]["status"] == "warning" and found["precision"]["cure"] == "train.precision=fp32"


def test_a_checkpoint_that_already_exists_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, config = make_run(tmp_path, monkeypatch)
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_interval": 10})})
    assert disk_check(config).found.startswith("5 more ")
    for step in (10, 20, 30):
        (run.checkpoints / step_name(step)).mkdir()
    assert disk_check(config).found.startswith("2 more ")


def test_a_short_run_needs_space_for_its_own_checkpoints_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, config = make_run(tmp_path, monkeypatch)
    for interval, expected in ((100, "2 more "), (60, "3 more "), (10, "5 more ")):
        train = config.train.model_copy(update={"checkpoint_interval": interval})
        assert disk_check(config.model_copy(update={"train": train})).found.startswith(expected)


def test_what_a_run_branches_from_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, config = make_run(tmp_path, monkeypatch)
    assert parent_check(config) == []
    folder = base.checkpoints / step_name(4)
    folder.mkdir()
    Manifest(4, 1, 0, {}, {}, {"config": config.model_dump(mode="json"), "optimizer_steps": 4}).save(folder)
    init = InitConfig(**{"from": str(base.path), "what": "all"})
    branch = config.model_copy(update={"name": "branch", "init": init})
    assert [one.status for one in parent_check(branch)] == ["ok"]
    wide = branch.model_copy(update={"model": config.model.model_copy(update={"d_ff": 32})})
    (failed,) = parent_check(wide)
    assert failed.status == "failed" and "model.d_ff" in failed.found
    missing = branch.model_copy(update={"init": init.model_copy(update={"step": 5})})
    assert [one.status for one in parent_check(missing)] == ["failed"]
    (run_for(branch).checkpoints / step_name(6)).mkdir(parents=True)
    assert parent_check(missing) == [], "with a checkpoint of its own a run needs its parent no more"


def test_missing_sources_a_cut_shard_and_a_missing_image_fail(
    tmp_path: Path, check: Checking, monkeypatch: pytest.MonkeyPatch
):
    write_files(
        tmp_path, {**CONFIG, "data": {**CONFIG["data"], "sources": [{"name": "t", "paths": ["nothing/*.txt"]}]}}
    )
    no_image = "container.image=none.sif"  # spares the import of torch by the checks of the node
    status, found = check(no_image)
    assert status == 1 and "nothing/*.txt" in found["data"]["found"]

    _, config = make_run(tmp_path, monkeypatch)
    prepare(config)
    shard = next((tmp_path / "tokens").rglob("train.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    status, found = check(no_image)
    assert status == 1 and "train.bin" in found["data"]["found"]
    assert found["container"]["status"] == "failed"


# Like Apptainer, it refuses a bind that does not exist; inside, it answers as pipeline.check.node does.
APPTAINER = """
while [ $# -gt 0 ]; do
  if [ "$1" = --bind ]; then shift; [ -e "${1%%:*}" ] || { echo "FATAL: mount $1: no such file" >&2; exit 255; }; fi
  shift
done
echo '[{"name": "torch", "status": "ok", "found": "of the image", "cure": ""}]'
"""


def test_the_checks_run_inside_the_image_before_there_is_a_run_and_leave_nothing_behind(
    tmp_path: Path, check: Checking, cluster: FakeSlurm
):
    command = program(tmp_path / "apptainer", APPTAINER)
    (tmp_path / "image" / ".singularity.d").mkdir(parents=True)
    (tmp_path / "image.json").write_text(json.dumps({"sha256": "0" * 64}))
    write_files(tmp_path, site={**SITE, "container": {"command": command}})
    before = sorted(tmp_path.iterdir())
    status, found = check("--site", "site.yaml", "container.image=image", slurm=cluster)
    assert (status, found["torch"]["found"], "node" in found) == (0, "of the image", False)
    assert sorted(tmp_path.iterdir()) == before


def test_checking_imports_no_torch_itself():
    probe = "import sys, pipeline.check.check, pipeline.check.site_request; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
