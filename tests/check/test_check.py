"""`pipeline check` says before the submission what would go wrong after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.check.check import _disk as disk_check
from pipeline.check.site_request import check_site_request
from pipeline.data.build.build import prepare
from pipeline.launch.site import Site
from pipeline.run.folder import step_name
from tests.launch.support import CONFIG, ROOT, SITE, FakeSlurm, make_run, pipeline, write_files

PARTITIONS = """main*|4|8|64000|1-00:00:00|gpu:a100:4(S:0-1)|up
small|1|2|4000|10:00|(null)|up
small|1|4|8000|10:00|(null)|up
"""


@pytest.fixture
def cluster(slurm: FakeSlurm) -> FakeSlurm:
    slurm.says("sinfo", PARTITIONS, call=1)
    for stage in range(3):
        slurm.says("sinfo", "gpu1\ngpu2\ngpu3\ngpu4\n", call=2 + 2 * stage)
    slurm.says("sinfo", "gpu1|idle|(null)|\ngpu2|allocated|(null)|\ngpu3|drained|(null)|\ngpu4|down*|(null)|\n")
    return slurm


def check(folder: Path, *args: str, slurm: FakeSlurm | None = None) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status and the checks by name."""
    (folder / "text").mkdir(exist_ok=True)
    (folder / "text" / "a.txt").write_text("We hold these truths to be self-evident. " * 50)
    done = pipeline(folder, "check", "config.yaml", *args, "--json", slurm=slurm)
    assert done.err == "", done.err
    return done.status, {one["name"]: one for one in json.loads(done.out)}


def with_site(**train: Any) -> dict[str, Any]:
    return {**SITE, "train": {**SITE["train"], **train}}


def test_a_config_that_will_work_here_passes_every_check(tmp_path: Path):
    write_files(tmp_path)
    status, found = check(tmp_path)
    assert status == 0
    assert {one["status"] for one in found.values()} <= {"ok", "warning"}
    assert found["torch"]["found"].startswith("2.") and found["deepspeed"]["status"] == "ok"
    assert "to be prepared from 1 files" in found["data"]["found"]


def test_a_site_that_gives_what_is_asked_for_passes(tmp_path: Path, cluster: FakeSlurm):
    write_files(tmp_path)
    status, found = check(tmp_path, "--site", "site.yaml", slurm=cluster)
    assert status == 0
    assert found["request of train"]["found"] == "fits main: 2 of 4 nodes, 30 min"
    assert "before the end" in found["time limit"]["found"]
    assert found["accounting"]["found"] == "sacct answers"


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"partition": "none"}, "there is no partition 'none'"),
        ({"nodes": 5}, "5 nodes, and main has 4"),
        ({"tasks_per_node": 4, "cpus_per_task": 4}, "16 CPUs a node, and main has 8"),
        ({"mem_gb": 100}, "100 GB of memory a node, and main has 62.5"),
        ({"gpus_per_node": 8, "tasks_per_node": 8}, "8 GPUs a node, and main has 4"),
        ({"time_limit_min": 1441}, "1441 minutes, and main has 1440"),
        ({"partition": "small", "nodes": 1, "cpus_per_task": 8, "time_limit_min": 9}, "8 CPUs a node, and small has 4"),
        ({"partition": "main,none"}, "there is no partition 'none'"),
        (
            {"partition": "small,main", "cpus_per_task": 16, "time_limit_min": 9},
            "small has 4; 16 CPUs a node, and main",
        ),
    ],
)
def test_a_request_that_the_partition_cannot_give_is_named(
    train, words, tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    run, config = make_run(tmp_path, monkeypatch)
    found = {one.name: one for one in check_site_request(config, Site.model_validate(with_site(**train)), run)}
    assert found["request of train"].status == "failed" and words in found["request of train"].found
    assert found["request of train"].cure


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"partition": "small", "cpus_per_task": 4, "time_limit_min": 9}, "fits small: 2 of 2 nodes"),
        ({"partition": "small,main"}, "fits main: 2 of 4 nodes, 30 min"),
    ],
)
def test_a_request_that_sbatch_would_take_is_not_refused(
    train, words, tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    run, config = make_run(tmp_path, monkeypatch)
    found = {one.name: one for one in check_site_request(config, Site.model_validate(with_site(**train)), run)}
    assert words in found["request of train"].found and found["request of train"].status == "ok"
    # Without it, `4+` would stand for nodes of 4 cores and more.
    assert "--exact" in cluster.calls("sinfo")[0]


def without_torch(folder: Path) -> str:
    """A Python, as on a login node, that has not got what training imports."""
    python = folder / "bare-python"
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'deepspeed')))"
    run = "import runpy; sys.argv = sys.argv[1:]; runpy.run_module('pipeline.check.node', run_name='__main__')"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -c "{blocked}; {run}" check_node "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_the_python_of_the_site_is_asked_for_torch(tmp_path: Path, cluster: FakeSlurm):
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '[{"name": "torch", "status": "ok", "found": "of the site", "cure": ""}]'\n""")
    python.chmod(0o755)
    write_files(tmp_path, site={**SITE, "python": str(python)})
    status, found = check(tmp_path, "--site", "site.yaml", slurm=cluster)
    assert (status, found["torch"]["found"]) == (0, "of the site")


@pytest.mark.parametrize(("modules", "expected"), [([], (1, "failed")), (["pytorch"], (0, "warning"))])
def test_a_login_node_without_torch_is_judged_by_what_the_jobs_load(
    tmp_path: Path, cluster: FakeSlurm, modules: list[str], expected: tuple[int, str]
):
    write_files(tmp_path, site={**SITE, "python": without_torch(tmp_path), "modules": modules})
    status, found = check(tmp_path, "--site", "site.yaml", slurm=cluster)
    assert (status, found["torch"]["status"]) == expected
    assert ("modules" in found["torch"]["cure"]) == bool(modules)
    assert ("`python` of the site file" in found["torch"]["cure"]) != bool(modules)


def test_nodes_that_are_down_are_a_warning_where_the_others_are_too_few(
    tmp_path: Path, cluster: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    run, config = make_run(tmp_path, monkeypatch)
    found = {one.name: one for one in check_site_request(config, Site.model_validate(with_site(nodes=3)), run)}
    assert found["request of train"].status == "warning"
    assert found["request of train"].found == "3 nodes, and 2 of the 4 in main work now"


def test_a_model_that_does_not_fit_is_refused_with_the_cure(tmp_path: Path, cluster: FakeSlurm):
    write_files(tmp_path, site=with_site(mem_gb=0.5))
    model = ["model.d_model=2048", "model.d_ff=8192", "model.num_layers=24"]
    status, found = check(tmp_path, "--site", "site.yaml", *model, slurm=cluster)
    assert status == 1
    assert found["memory"]["status"] == "failed" and "train.zero_stage" in found["memory"]["cure"]


def test_a_controller_that_does_not_answer_is_one_failed_check(tmp_path: Path, cluster: FakeSlurm):
    write_files(tmp_path)
    cluster.says("sinfo", err="sinfo: error: Unable to contact slurm controller (connect failure)\n", status=1, call=1)
    status, found = check(tmp_path, "--site", "site.yaml", slurm=cluster)
    assert status == 1 and "Unable to contact slurm controller" in found["slurm"]["found"]


def test_a_kept_checkpoint_that_is_there_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, config = make_run(tmp_path, monkeypatch)
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_interval": 10})})
    assert disk_check(config).found.startswith("5 more checkpoints")
    for step in (10, 20, 30):
        (run.checkpoints / step_name(step)).mkdir()
    assert disk_check(config).found.startswith("2 more checkpoints")


def test_missing_sources_a_cut_shard_and_a_missing_image_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_files(
        tmp_path, {**CONFIG, "data": {**CONFIG["data"], "sources": [{"name": "t", "paths": ["nothing/*.txt"]}]}}
    )
    status, found = check(tmp_path)
    assert status == 1 and "nothing/*.txt" in found["data"]["found"]

    _, config = make_run(tmp_path, monkeypatch)
    prepare(config)
    shard = next((tmp_path / "tokens").rglob("train.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    status, found = check(tmp_path, "container.image=none.sif")
    assert status == 1 and "train.bin: is missing or not of its size" in found["data"]["found"]
    assert found["container"]["status"] == "failed"


# Like Apptainer it binds nothing that is not there; inside it answers as pipeline.check.node does.
APPTAINER = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = --bind ]; then shift; [ -e "${1%%:*}" ] || { echo "FATAL: mount $1: no such file" >&2; exit 255; }; fi
  shift
done
echo '[{"name": "torch", "status": "ok", "found": "of the image", "cure": ""}]'
"""


def test_the_inside_of_an_image_is_looked_at_before_there_is_a_run_and_nothing_is_left(
    tmp_path: Path, cluster: FakeSlurm
):
    command = tmp_path / "apptainer"
    command.write_text(APPTAINER)
    command.chmod(0o755)
    (tmp_path / "image" / ".singularity.d").mkdir(parents=True)
    (tmp_path / "image.json").write_text(json.dumps({"sha256": "0" * 64}))
    write_files(tmp_path, site={**SITE, "container": {"command": str(command)}})
    before = sorted(tmp_path.iterdir())
    status, found = check(tmp_path, "--site", "site.yaml", "container.image=image", slurm=cluster)
    assert (status, found["torch"]["found"], "node" in found) == (0, "of the image", False)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "text"])


def test_checking_imports_no_torch_itself():
    probe = "import sys, pipeline.check.check, pipeline.check.slurm; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
