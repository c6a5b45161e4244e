"""`check` finds what `submit` would refuse, and `submit` refuses what `check` fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.check.check import _of_the_site
from pipeline.check.memory import check_memory
from pipeline.check.result import Check
from pipeline.check.submission import check_submission
from pipeline.config.load import load_config
from pipeline.launch.site import Site
from tests.check.conftest import PARTITIONS
from tests.launch.support import SITE, FakeSlurm, submit, write_files

NODES = "allocation failure: Requested node configuration is not available"
ACCOUNT = "allocation failure: Invalid account or account/partition combination specified"
GPUS = {"nodes": 1, "tasks_per_node": 4, "gpus_per_node": 4}
LARGE = ["model.d_model=2048", "model.d_ff=8192", "model.num_layers=24"]


def checked(*overrides: str, known: tuple[Check, ...] = ()) -> dict[str, Check]:
    return {one.name: one for one in check_submission("config.yaml", "site.yaml", overrides, (), known)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sbatch_judges_every_job_and_none_is_submitted(folder: Path, slurm: FakeSlurm):
    found = checked()
    assert {name: one.status for name, one in found.items()} == {"submission of prepare, train, evaluate": "ok"}
    assert slurm.calls("sbatch") == ["--test-only"] * 3
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("said", "status", "words", "cure"),
    [
        (ACCOUNT, "failed", "site.yaml: account: Slurm refuses it (Invalid account", "sacctmgr"),
        ("allocation failure: Invalid partition name specified", "failed", "site.yaml: train.partition",
         "partitions here"),
        (NODES, "warning", "Requested node configuration is not available", "sinfo -R"),
        ("allocation failure: Required node not available (down, drained or reserved)", "warning", "down", "sinfo -R"),
        ("allocation failure: Invalid license specification", "failed", "site.yaml: Slurm refuses it (Invalid license",
         "extra_sbatch"),
        ("allocation failure: Requested reservation is invalid", "failed", "reservation is invalid", "extra_sbatch"),
        ("allocation failure: Unable to contact slurm controller (connect failure)", "warning", "contact", "sinfo -R"),
        ("sbatch: no answer within 60 seconds; try `scontrol ping`", "warning", "no answer", "sinfo -R"),
        ("allocation failure: Slurm backup controller in standby mode", "warning", "standby", "sinfo -R"),
        ("allocation failure: Zero Bytes were transmitted or received", "warning", "Zero Bytes", "sinfo -R"),
        ("allocation failure: Transport endpoint is not connected", "warning", "not connected", "sinfo -R"),
        ("QOSMaxSubmitJobPerUserLimit", "warning", "QOSMaxSubmitJobPerUserLimit", "sinfo -R"),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_is_a_failed_check_unless_it_may_pass(
    folder: Path, slurm: FakeSlurm, said: str, status: str, words: str, cure: str
):
    slurm.says("sbatch", err=f"{said}\n", status=1, call=2)
    found = checked()
    assert found.pop("submission of prepare, evaluate").status == "ok"
    (only,) = found.values()
    assert (only.name, only.status) == ("submission of train", status)
    assert words in only.found and cure in only.cure


def test_the_rules_of_submit_itself_are_checked_and_nothing_is_told_twice(folder: Path, slurm: FakeSlurm):
    (only,) = checked("runs_dir=a%j").values()
    assert only.status == "failed" and "has a % in its name" in only.found
    assert checked("runs_dir=a%j", known=(Check("container", "failed", "has a % in its name"),)) == {}
    asked = Check("request of train", "failed", "there is no partition 'x'")
    assert checked(known=(asked,)).keys() == {"submission of prepare, evaluate"}
    assert checked(known=(Check("slurm", "failed", "no"),)) == {}


@pytest.mark.parametrize(
    ("train", "overrides", "words"),
    [
        ({"mem_gb": 0.5}, LARGE, ["memory: ", "train.zero_stage"]),
        ({}, ["data.sources=[{name: t, paths: ['nothing/*.txt']}]"], ["data: ", "nothing/*.txt"]),
        ({"partition": "none"}, [], ["request of train", "'none'", "allowed: main, small"]),
        ({"nodes": 8}, [], ["8 nodes", "main has 4"]),
    ],
)
def test_submit_refuses_what_check_fails(
    tmp_path: Path, slurm: FakeSlurm, train: dict[str, Any], overrides: list[str], words: list[str]
):
    write_files(tmp_path, site={**SITE, "train": {**SITE["train"], **train}})
    slurm.says("sinfo", PARTITIONS)
    done = submit(tmp_path, slurm, *overrides)
    assert done.status == 2 and "`pipeline check` fails with site.yaml, so nothing was submitted" in done.err
    assert [word for word in words if word not in done.err] == []
    assert slurm.calls("sbatch") == [] and not (tmp_path / "runs").exists()
    assert len(slurm.calls("sinfo")) == 1, "only `check` asks which nodes work now"


@pytest.mark.parametrize(
    ("site", "status", "words"),
    [
        ({"train": GPUS}, "warning", "the site names no gpu_type"),
        ({"train": GPUS, "gpu_type": "h900"}, "warning", "the memory of a h900 is unknown"),
        ({"train": GPUS, "gpu_type": "h100"}, "ok", "of 79.1 GiB of a h100"),
        ({"train": {"nodes": 1}}, "warning", "the site sets no train.mem_gb"),
        ({"train": {"nodes": 1, "mem_gb": 4}}, "ok", "of 4.0 GiB by train.mem_gb"),
    ],
)
def test_memory_that_cannot_be_compared_is_a_warning_with_its_cure(
    folder: Path, site: dict[str, Any], status: str, words: str
):
    found = check_memory(load_config("config.yaml"), Site.model_validate({**SITE, **site}))
    assert found.status == status and words in found.found and bool(found.cure) == (status == "warning")


def test_a_login_node_without_a_gpu_is_a_warning_where_the_jobs_request_some():
    here = [Check("torch", "ok", "2.13"), Check("devices", "ok", "no GPU, 8 CPU cores")]
    torch, devices = _of_the_site(here, Site.model_validate({**SITE, "train": GPUS}))
    assert torch.status == "ok" and devices.status == "warning" and "run this command in a job" in devices.cure
    assert _of_the_site(here, Site.model_validate(SITE)) == here
    seen = [Check("devices", "ok", "4 x NVIDIA H100")]
    assert _of_the_site(seen, Site.model_validate({**SITE, "train": GPUS})) == seen
