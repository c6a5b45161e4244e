"""`pipeline cancel`: only the jobs of the run, and those of its sweep that no other run waits for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.launch.slurm import client, job_records
from pipeline.launch.slurm.client import SlurmError
from pipeline.launch.slurm.job_records import Job
from pipeline.run.folder import Run
from tests.launch.support import FakeSlurm, make_run, pipeline, submit, write_files

SEEDS = ("--sweep", "train.seed=1,2")
RUNS = ("runs/tiny-seed-1", "runs/tiny-seed-2")


def cancelled(folder: Path, slurm: FakeSlurm, *runs: str) -> str:
    """What `pipeline cancel` prints."""
    done = pipeline(folder, "cancel", *runs, slurm=slurm)
    assert (done.status, done.err) == (0, "")
    return done.out


def test_the_jobs_of_a_run_are_cancelled_and_noted(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm).status == 0
    slurm.says("squeue", "102|RUNNING|None|||tiny-train\n103|PENDING|None|||tiny-evaluate\n")
    assert cancelled(tmp_path, slurm, "runs/tiny") == "runs/tiny: cancelled job 102, 103\n"
    assert slurm.calls("scancel") == ["102 103"]


def test_a_job_of_another_name_under_an_old_id_is_left_alone(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, "name=old").status == 0
    assert {job["name"] for job in json.loads((tmp_path / "runs/old/launch/jobs.json").read_text())["jobs"]} == {
        "old-prepare", "old-train", "old-evaluate",
    }  # fmt: skip
    # A new cluster starts counting ids again.
    slurm.says("squeue", "102|RUNNING|None|||new-train\n")
    assert re.fullmatch(r"runs/old: no job .*\n", cancelled(tmp_path, slurm, "runs/old"))
    assert slurm.calls("scancel") == []
    done = submit(tmp_path, slurm, "name=old")
    assert done.status == 0, done.err


def test_a_job_that_was_recorded_before_names_were_goes_by_its_id(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    run, _ = make_run(tmp_path, monkeypatch)
    old = {"id": "7", "stage": "train", "tasks": 1, "submitted": 5.0, "site": "here", "accounting": True}
    run.jobs_file.write_text(json.dumps({"jobs": [old]}))
    assert job_records.jobs(run) == [Job("7", "train", 1, 5.0, "here", True)]
    slurm.says("squeue", "7|RUNNING|None|||tiny-train\n")
    assert cancelled(tmp_path, slurm, "runs/tiny") == "runs/tiny: cancelled job 7\n"


def test_the_prepare_array_of_a_sweep_goes_with_the_last_of_its_runs(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, *SEEDS).status == 0
    name = Run(next(tmp_path.glob("runs/tiny-sweep-*"))).name
    prepare = "".join(f"101_{i}|PENDING|None|||{name}-prepare\n" for i in range(2))
    second = f"102_1|PENDING|None|||{name}-train\n103_1|PENDING|None|||{name}-evaluate\n"
    first = second.replace("_1|", "_0|")
    slurm.says("squeue", prepare + first + second, call=1)
    slurm.says("squeue", prepare + second, call=2)
    assert cancelled(tmp_path, slurm, *RUNS) == (
        "runs/tiny-seed-1: cancelled job 102_0, 103_0\nruns/tiny-seed-2: cancelled job 101, 102_1, 103_1\n"
    )
    assert slurm.calls("scancel") == ["102_0 103_0", "101 102_1 103_1"]


def test_a_prepare_array_that_was_left_behind_is_taken_out_by_any_run_of_the_sweep(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, *SEEDS).status == 0
    name = Run(next(tmp_path.glob("runs/tiny-sweep-*"))).name
    slurm.says("squeue", f"101_0|PENDING|None|||{name}-prepare\n102_1|PENDING|None|||another-train\n")
    assert cancelled(tmp_path, slurm, RUNS[0]) == "runs/tiny-seed-1: cancelled job 101\n"


def test_a_sweeps_folder_stands_for_its_runs_and_a_bad_name_stops_nothing(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, *SEEDS).status == 0
    home = Run(next(tmp_path.glob("runs/tiny-sweep-*")))
    queue = "".join(f"102_{i}|PENDING|None|||{home.name}-train\n" for i in range(2))
    slurm.says("squeue", queue)
    (tmp_path / "runs/file").touch()
    names = sorted(f"runs/{path.name}" for path in (tmp_path / "runs").iterdir())
    assert len(names) == 4  # the file, two runs, and the sweep
    shown = pipeline(tmp_path, "status", *names, "--json", slurm=slurm)
    assert [one["run"] for one in json.loads(shown.out)] == list(RUNS)
    assert (shown.status, shown.err.count("\n")) == (2, 1) and "runs/file (here " in shown.err
    done = pipeline(tmp_path, "cancel", f"runs/{home.name}", "runs/nothing", slurm=slurm)
    assert done.out == "".join(f"{run}: cancelled job 102_{i}\n" for i, run in enumerate(RUNS))
    assert done.status == 2 and "runs/nothing (here " in done.err
    (tmp_path / RUNS[0] / "launch/jobs.json").write_text("[]")
    done = pipeline(tmp_path, "cancel", f"runs/{home.name}", slurm=slurm)
    assert done.status == 1 and done.out == f"{RUNS[1]}: cancelled job 102_1\n" and "jobs.json" in done.err


@pytest.mark.parametrize("hostile", ["--me", "-u", "1 2", "12;ls", "", "12_x", 12, None, ["12"]])
def test_an_id_that_is_no_job_reaches_no_command_of_slurm(tmp_path: Path, slurm: FakeSlurm, hostile: object):
    write_files(tmp_path)
    assert submit(tmp_path, slurm).status == 0
    file = tmp_path / "runs/tiny/launch/jobs.json"
    tree = json.loads(file.read_text())
    tree["jobs"][0]["id"] = hostile
    file.write_text(json.dumps(tree))
    done = pipeline(tmp_path, "cancel", "runs/tiny", slurm=slurm)
    assert done.status == 1 and done.err.count("\n") == 1 and "launch/jobs.json: " in done.err
    assert slurm.calls("scancel") == []
    with pytest.raises(SlurmError):
        client.cancel([str(hostile), "12"] if hostile != 12 else ["--me"])


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"jobs": {}}', '{"jobs": [1]}', '{"jobs": [{"id": "1"}]}', "null", "["]
)
def test_a_list_of_jobs_of_another_shape_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str):
    run, _ = make_run(tmp_path, monkeypatch)
    run.jobs_file.write_text(content)
    with pytest.raises(PipelineError, match=f"^{run.jobs_file}: "):
        job_records.jobs(run)
