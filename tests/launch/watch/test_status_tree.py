"""`pipeline status` shows the runs that branch from a run below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_config
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.job_records import Job
from pipeline.run.folder import Run, create_run
from pipeline.run.related import Branch, add_branches
from tests.launch.support import FakeSlurm, make_run, pipeline


@pytest.fixture
def stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with two decays, made in the other order, and a branch of the first one."""
    run, _ = make_run(tmp_path, monkeypatch)
    for step, parent in ((80, "runs/tiny"), (40, "runs/tiny"), (45, "runs/decay-40/checkpoints/step_00000045")):
        origin = [f"init.from={parent}", "init.what=all", *([f"init.step={step}"] if step != 45 else [])]
        branch = create_run(load_config("config.yaml", [f"name=decay-{step}", *origin]))
        branch.launch.mkdir()
        job_records.add_jobs(branch, [Job(str(100 + step), "train", 1, 5.0, "here", True, name=f"decay-{step}-train")])
        if step != 45:
            add_branches(run, [Branch(step, branch)])
    return run


def test_the_decays_of_a_run_are_below_its_details(stable: Run, tmp_path: Path, slurm: FakeSlurm):
    slurm.says("squeue", "180|PENDING|Dependency|||decay-80-train\n140|RUNNING|None|n1||decay-40-train\n")
    lines = pipeline(tmp_path, "status", "runs/tiny", slurm=slurm).out.splitlines()
    assert lines[0].split() == ["run", "runs/tiny"]
    below = [line.split()[:2] for line in lines[-2:]]
    assert below == [["runs/decay-40", "running"], ["runs/decay-80", "queued"]]
    waiting = pipeline(tmp_path, "status", "runs/decay-80", slurm=slurm).out
    assert "waits for step 80 of runs/tiny" in waiting


def test_the_table_of_all_runs_is_a_tree(stable: Run, tmp_path: Path, slurm: FakeSlurm):
    lines = pipeline(tmp_path, "status", slurm=slurm).out.splitlines()
    assert [line.rstrip().split("  unknown")[0].split("  stopped")[0].rstrip() for line in lines[1:]] == [
        "runs/tiny", "└ decay-80", "└ decay-40", "  └ decay-45",
    ]  # fmt: skip
