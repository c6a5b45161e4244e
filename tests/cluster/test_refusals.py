"""Submissions that a real Slurm or a full disk rejects: one clear message, and nothing stays in the queue."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.devcluster.hosts import run_on
from pipeline.devcluster.settings import LOGIN
from pipeline.errors import EXIT_FAILED, EXIT_USAGE
from tests.cluster.support import ROOT, Cluster, open_cluster, wait_until
from tests.cluster.training import Training, describe


@pytest.fixture(scope="module")
def cluster(cluster: Cluster) -> Cluster:
    """The cluster with a working folder for this file only; without prepared data, every chain has three jobs."""
    return open_cluster(cluster.settings.state, cluster.work / "refusals")


_REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "partition": ({"train": {"partition": "nope"}}, ["request of train", "'nope'", "allowed: high, low, main"]),
    "nodes": ({"train": {"nodes": 8}}, ["request of train: 8 nodes, and main has 5"]),
    "memory": ({"train": {"mem_gb": 100}}, ["request of train: 100 GB of memory per node"]),
    "gpus": (
        {"train": {"gpus_per_node": 8, "tasks_per_node": 8, "nodes": 1}},
        ["request of train: ", "8 GPUs per node, and main has 4"],
    ),
    "time": (
        {"train": {"partition": "high", "time_limit_min": 90}},
        ["request of train: 90 minutes, and high has 60"],
    ),
    "account": ({"account": "nobody"}, ["account", "sacctmgr show associations"]),
    "the last of the chain": ({"evaluate": {"partition": "nope"}}, ["request of evaluate", "'nope'"]),
    "key": ({"acount": "research"}, ["acount", "did you mean `account`"]),
}


@pytest.mark.parametrize("kind", _REFUSED)
def test_a_request_that_cannot_be_met_is_one_message_and_nothing_is_submitted(cluster: Cluster, kind: str) -> None:
    changes, words = _REFUSED[kind]
    name = f"refused-{kind.replace(' ', '-')}"
    before = _jobs(cluster)
    run = describe(cluster, name, "train.micro_batch_size=1", **changes)
    refused = run.try_to_submit()
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    for word in (str(run.site), *words):
        assert word in refused.stderr
    _assert_nothing_is_left(run, before)


@pytest.fixture
def two_jobs_at_most(cluster: Cluster) -> Iterator[str]:
    """An account whose limit the prepare array of two tasks uses up."""
    change = ("sacctmgr", "--immediate", "modify", "user", "root", "where", "account=teaching", "set")
    cluster.run(*change, "MaxSubmitJobs=2")
    yield "teaching"
    cluster.run(*change, "MaxSubmitJobs=-1")


def test_a_chain_that_hits_a_limit_halfway_is_cancelled(cluster: Cluster, two_jobs_at_most: str) -> None:
    before = _jobs(cluster)
    run = describe(cluster, "limited", account=two_jobs_at_most, extra_sbatch={"hold": True})
    refused = run.try_to_submit()
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    for words in ("train: ", "AssocMaxSubmitJobLimit", "squeue --me"):
        assert words in refused.stderr
    _assert_nothing_is_left(run, before)
    cancelled = cluster.run("squeue", "--noheader", "--states=all", "--name=limited-prepare", "--format=%T").split()
    assert set(cancelled) == {"CANCELLED"}


@pytest.fixture
def small_disk(cluster: Cluster) -> Iterator[Path]:
    """A disk of 16 MB that only the login host sees."""
    disk = cluster.work / "disk"
    disk.mkdir(exist_ok=True)
    _on_login(cluster, "mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk))
    yield disk
    _on_login(cluster, "umount", str(disk))


# Fills the disk as soon as the first job is in the queue, and keeps its id.
_SBATCH = """#!/bin/sh
{sbatch} "$@" | tee -a {work}/submitted
head -c 64M /dev/zero >{disk}/of-others 2>/dev/null
exit 0
"""


@pytest.mark.parametrize(
    ("when", "ends", "words"),
    [
        ("before", (EXIT_USAGE, "", 2), ["`pipeline check` fails", "are free", "runs_dir"]),
        ("in the middle", (EXIT_FAILED, "", 1), ["No space left on device", "runs_dir"]),
    ],
)
def test_a_full_disk_is_one_message_and_nothing_is_submitted_halfway(
    cluster: Cluster, small_disk: Path, when: str, ends: tuple[int, str, int], words: list[str]
) -> None:
    before = _jobs(cluster)
    name = f"full-{when.replace(' ', '-')}"
    run = describe(cluster, name, f"runs_dir={small_disk}/runs", extra_sbatch={"hold": True})
    (cluster.work / "bin").mkdir(exist_ok=True)
    sbatch = cluster.work / "bin" / "sbatch"
    sbatch.write_text(_SBATCH.format(sbatch=cluster.settings.bin / "sbatch", work=cluster.work, disk=small_disk))
    sbatch.chmod(0o755)
    if when == "before":
        _on_login(cluster, "sh", "-c", f"head -c 64M /dev/zero >{small_disk}/of-others", check=False)
    path = f"{sbatch.parent}:{cluster.env['PATH']}"
    submission = ["submit", str(run.config), "--site", str(run.site), *run.overrides]
    status, out, err = _on_login(
        cluster, "env", f"PATH={path}", f"PYTHONPATH={ROOT}", sys.executable, "-m", "pipeline", *submission, check=False
    )
    assert (status, out, err.count("\n")) == ends, err
    assert all(word in err for word in [str(small_disk), *words])
    assert _on_login(cluster, "ls", "-A", f"{small_disk}/runs", check=False)[1] == ""
    assert _jobs(cluster) == before
    if when == "in the middle":
        (job,) = re.findall(r"Submitted batch job (\d+)", (cluster.work / "submitted").read_text())
        assert cluster.show(job)["JobState"] == "CANCELLED"


def test_check_predicts_what_slurm_would_accept_and_reject(cluster: Cluster) -> None:
    good = describe(cluster, "good")
    status, found = _check(good)
    assert status == 0, found
    assert "main: 1 of 5" in found["request of prepare"]["found"] and "30 min" in found["request of prepare"]["found"]
    assert "main: 2 of 5" in found["request of train"]["found"] and "60 min" in found["request of train"]["found"]
    assert found["accounting"]["found"] == "sacct answers"
    assert found["torch"]["status"] == "ok"
    assert found["submission of prepare, train, evaluate"]["status"] == "ok"
    status, found = _check(describe(cluster, "charged", account="nobody"))
    refused = found["submission of prepare, train, evaluate"]
    assert (status, refused["status"]) == (1, "failed") and "site.yaml: account" in refused["found"].replace(
        "charged", "site"
    )
    bad = describe(
        cluster, "bad", "train.micro_batch_size=1", prepare={"partition": "nope"},
        train={"nodes": 8, "mem_gb": 100, "partition": "high"}, evaluate={"time_limit_min": 90, "partition": "high"},
    )  # fmt: skip
    status, found = _check(bad)
    assert status == 1
    assert found["request of prepare"]["cure"] == "allowed: high, low, main"
    assert found["request of train"]["found"].startswith("8 nodes") and "100 GB" in found["request of train"]["found"]
    assert found["request of evaluate"]["found"].startswith("90 minutes") and found["request of evaluate"]["cure"]
    assert not good.run.exists()
    assert not bad.run.exists()


def _check(run: Training) -> tuple[int, dict[str, dict[str, Any]]]:
    done = run.pipeline("check", str(run.config), "--site", str(run.site), *run.overrides, "--json")
    assert done.stderr == ""
    return done.returncode, {one["name"]: one for one in json.loads(done.stdout)}


def _on_login(cluster: Cluster, *command: str, check: bool = True) -> tuple[int, str, str]:
    """Runs a command on the login host; returns status, stdout and stderr."""
    done = run_on(cluster.settings, LOGIN, list(command))
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.returncode, done.stdout, done.stderr


def _assert_nothing_is_left(run: Training, jobs: list[str]) -> None:
    """Asserts that the queue is unchanged and there is no run folder."""
    assert not run.run.exists()
    wait_until(lambda: _jobs(run.cluster) == jobs, 30, lambda: str(_jobs(run.cluster)))


def _jobs(cluster: Cluster) -> list[str]:
    """Returns the jobs that are queued or running."""
    return cluster.run("squeue", "--noheader", "--format=%i %j %T").splitlines()
