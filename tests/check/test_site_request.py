"""A site's request is compared with the partitions, the time limit and the accounting of the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.check.result import Check
from pipeline.check.site_request import check_site_request
from pipeline.launch.site import Site
from pipeline.run.folder import Run
from tests.launch.support import SITE, FakeSlurm, make_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return make_run(tmp_path, monkeypatch)[0]


def checks(run: Run, **changes: Any) -> dict[str, Check]:
    """The results by name, for a site whose training requests these changes; other keys are the site's own."""
    site = {**SITE, **changes.pop("site", {})}
    site = Site.model_validate({**site, "train": {**SITE["train"], **changes}})
    return {one.name: one for one in check_site_request(site, run)}


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"partition": "none"}, ["'none'"]),
        ({"nodes": 5}, ["5 nodes", "main has 4"]),
        ({"tasks_per_node": 4, "cpus_per_task": 4}, ["16 CPUs", "main has 8"]),
        ({"mem_gb": 100}, ["100 GB", "main has 62.5"]),
        ({"gpus_per_node": 8, "tasks_per_node": 8}, ["8 GPUs", "main has 4"]),
        ({"time_limit_min": 1441}, ["1441 minutes", "main has 1440"]),
        ({"partition": "small", "nodes": 1, "cpus_per_task": 8, "time_limit_min": 9}, ["8 CPUs", "small has 4"]),
        ({"partition": "small", "time_limit_min": 11}, ["11 minutes", "small has 10"]),
        ({"partition": "main,none"}, ["'none'"]),
        ({"partition": "small,main", "cpus_per_task": 16, "time_limit_min": 9}, ["small has 4", "main has 8"]),
    ],
)
def test_a_request_that_the_partition_cannot_grant_is_named(
    train: dict[str, Any], words: list[str], run: Run, cluster: FakeSlurm
):
    found = checks(run, **train)["request of train"]
    assert found.status == "failed" and found.cure
    assert [word for word in words if word not in found.found] == []


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"partition": "small", "cpus_per_task": 4, "time_limit_min": 10}, "small: 2 of 2"),
        ({"partition": "small,main"}, "main: 2 of 4"),
        ({"time_limit_min": 1440}, "1440 min"),
        ({"tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 2, "mem_gb": 62.5}, "main: 2 of 4"),
    ],
)
def test_a_request_that_sbatch_would_accept_is_not_refused(
    train: dict[str, Any], words: str, run: Run, cluster: FakeSlurm
):
    found = checks(run, **train)["request of train"]
    assert words in found.found and found.status == "ok"
    # Without it, `4+` would stand for nodes of 4 cores and more.
    assert "--exact" in cluster.calls("sinfo")[0]


@pytest.mark.parametrize(("limit", "minutes"), [("2-03:30:00", 3090), ("5:30:00", 330), ("45:00", 45)])
def test_every_part_of_a_partition_s_time_limit_counts(limit: str, minutes: int, run: Run, cluster: FakeSlurm):
    cluster.says("sinfo", f"main*|4|8|64000|{limit}|(null)|up\n", call=1)
    found = checks(run, time_limit_min=minutes + 1)["request of train"]
    assert found.status == "failed" and f"main has {minutes}" in found.found


def test_nodes_that_are_down_are_a_warning_where_too_few_are_left(run: Run, cluster: FakeSlurm):
    found = checks(run, nodes=3)["request of train"]
    assert found.status == "warning" and "2 of the 4" in found.found


def test_a_partition_that_is_down_is_a_warning(run: Run, cluster: FakeSlurm):
    cluster.says("sinfo", "main*|4|8|64000|infinite|(null)|down\n", call=1)
    found = checks(run, time_limit_min=100_000)["request of train"]
    assert found.status == "warning" and "main" in found.found


@pytest.mark.parametrize(("used", "status"), [(True, "warning"), (False, "ok")])
def test_accounting_that_does_not_answer_is_a_warning_where_the_site_uses_it(
    run: Run, cluster: FakeSlurm, used: bool, status: str
):
    cluster.says("sacct", err="sacct: error: slurmdbd is away\n", status=1)
    found = checks(run, site={"accounting": used})
    assert found["accounting"].status == status and found["time limit"].status == "ok"


def test_a_time_limit_too_short_to_save_is_refused(run: Run, cluster: FakeSlurm):
    found = checks(run, time_limit_min=1, site={"signal_before_end_s": 60})["time limit"]
    assert found.status == "failed" and "train.time_limit_min" in found.cure


def test_without_slurm_there_is_one_failed_check(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/not/there")
    assert {name: one.status for name, one in checks(run).items()} == {"slurm": "failed"}


def test_a_controller_that_does_not_answer_is_one_failed_check(run: Run, cluster: FakeSlurm):
    cluster.says("sinfo", err="sinfo: error: Unable to contact slurm controller (connect failure)\n", status=1, call=1)
    found = checks(run)
    assert found.keys() == {"slurm"} and "Unable to contact" in found["slurm"].found


@pytest.mark.parametrize(
    ("slices", "runs", "words"), [(3, 4, ""), (5, 1, "prepare.slices"), (1, 5, "--sweep"), (5, 5, "--sweep")]
)
def test_slices_and_sweeps_are_compared_with_the_largest_array(
    run: Run, cluster: FakeSlurm, slices: int, runs: int, words: str
):
    cluster.says("scontrol", "MaxArraySize            = 4\nMaxJobCount = 9\n")
    site = Site.model_validate({**SITE, "prepare": {"slices": slices}})
    (found,) = [one for one in check_site_request(site, run, runs) if one.name == "arrays"]
    assert found.status == ("failed" if words else "ok") and words in found.cure and "4" in found.found
