"""Submitting: what the jobs look like, and that a refusal leaves nothing behind."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.submit.dry_runs import CASES, GOLDEN, render
from tests.launch.support import SITE, FakeSlurm, events, pipeline, submit, write_files
from tests.yardstick import in_plain_starts


@pytest.mark.parametrize("case", CASES)
def test_a_dry_run_is_the_golden_file_and_writes_nothing(case):
    assert render(case) == (GOLDEN / f"{case}.txt").read_text(), "python -m tests.launch.submit.dry_runs"


@pytest.mark.parametrize(("minutes", "written"), [(5, "0-00:05:00"), (1440, "1-00:00:00"), (3001, "2-02:01:00")])
def test_a_time_limit_is_written_as_slurm_shows_it(tmp_path: Path, slurm: FakeSlurm, minutes: int, written: str):
    write_files(tmp_path, site={**SITE, "train": {"nodes": 1, "time_limit_min": minutes}})
    shown = submit(tmp_path, slurm, "--dry-run").out
    assert f"#SBATCH --time={written}\n" in shown


@pytest.mark.parametrize(("nodes", "shared"), [(8, False), (16, True)])
def test_above_64_ranks_srun_writes_one_log_per_node(tmp_path: Path, slurm: FakeSlurm, nodes: int, shared: bool):
    write_files(tmp_path, site={**SITE, "train": {"nodes": nodes, "tasks_per_node": 8}})
    shown = submit(tmp_path, slurm, "--dry-run", "train.batch_size=256", "runs_dir=my runs").out
    train = shown.partition("### train")[2].partition("### evaluate")[0]
    srun = shlex.split(next(line for line in train.splitlines() if line.startswith("srun ")))
    logs = [f"--{kind}={tmp_path}/my runs/tiny/launch/%j_%n_log.{kind[:3]}" for kind in ("output", "error")]
    assert ([part for part in srun if "%n_log" in part] == [logs[0], logs[1]]) == shared


def test_a_script_says_what_it_is_and_how_to_resume(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm).status == 0
    header = (tmp_path / "runs/tiny/launch/102_submission.sh").read_text().partition("\n#SBATCH")[0]
    assert header.startswith(f"#!/bin/bash\n# train of the run {tmp_path}/runs/tiny, submitted to here")
    for words in (f"{tmp_path}/runs/tiny/config.yaml", "commit", f"pipeline submit {tmp_path}/runs/tiny/config.yaml"):
        assert words in header


def test_the_scripts_that_are_submitted_are_those_of_the_dry_run(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    shown = submit(tmp_path, slurm, "--dry-run").out
    done = submit(tmp_path, slurm)
    assert done.status == 0, done.err
    ids = {"<prepare>": "101", "<train>": "102"}
    for stage, job in (("prepare", "101"), ("train", "102"), ("evaluate", "103")):
        script = (tmp_path / f"runs/tiny/launch/{job}_submission.sh").read_text()
        for placeholder, known in ids.items():
            shown = shown.replace(f"'afterok:{placeholder}'", f"afterok:{known}")
        assert script.rstrip() in shown, stage


def test_the_stages_are_chained_and_remembered(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    done = submit(tmp_path, slurm)
    jobs = json.loads((tmp_path / "runs/tiny/launch/jobs.json").read_text())["jobs"]
    assert [(j["stage"], j["id"], j["tasks"]) for j in jobs] == [
        ("prepare", "101", 2), ("train", "102", 1), ("evaluate", "103", 1),
    ]  # fmt: skip
    assert [e["event"] for e in events(tmp_path / "runs/tiny")] == ["submitted"]
    for words in ("job 101", "job 102", "after job 101", "after job 102", "pipeline status runs/tiny"):
        assert words in done.out


def test_stages_that_are_done_are_skipped(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert pipeline(tmp_path, "prepare", "config.yaml").status == 0
    done = submit(tmp_path, slurm)
    assert re.search(r"prepare +skipped: tokens/manifest\.json ", done.out)
    assert len(slurm.calls("sbatch")) == 2
    assert "dependency" not in (tmp_path / "runs/tiny/launch/101_submission.sh").read_text()

    run = tmp_path / "runs/tiny"
    (run / "checkpoints/step_00000100").mkdir()
    (run / "checkpoints/step_00000100/manifest.json").write_text("{}")
    evaluated = {"step": 100, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.5, "tokens": 100}
    (run / "evaluation.json").write_text(json.dumps(evaluated))
    (run / "report.html").write_text("")
    done = submit(tmp_path, slurm)
    assert "nothing was submitted" in done.out
    assert submit(tmp_path, slurm, "--dry-run").out == done.out
    assert len(slurm.calls("sbatch")) == 2


def test_a_run_in_the_queue_is_not_submitted_a_second_time(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm).status == 0
    slurm.says("squeue", "102|RUNNING|None|||tiny-train\n")
    done = submit(tmp_path, slurm)
    assert done.status == 2
    assert "queue as job 102" in done.err
    assert len(slurm.calls("sbatch")) == 3


def test_a_chain_that_fails_in_the_middle_is_undone(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    slurm.says("sbatch", err="sbatch: error: invalid partition specified: nope\n", status=1, call=3)
    done = submit(tmp_path, slurm)
    assert done.status == 2
    assert "evaluate.partition" in done.err
    assert slurm.calls("scancel") == ["101 102"]
    assert not (tmp_path / "runs/tiny").exists()


def test_a_job_whose_id_was_never_reported_is_cancelled(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    # submitit fails when sbatch has put the job into the queue already.
    (slurm.folder / "sbatch").write_text('#!/bin/sh\nrm "$1"; echo Submitted batch job 101\n')
    launch = tmp_path / "runs/tiny/launch"
    slurm.says("squeue", f"101|{launch}/.submission_file_1.sh\n99|{tmp_path}/runs/other/launch/.submission_file_2.sh\n")
    done = submit(tmp_path, slurm)
    assert (done.status, done.err.count("\n")) == (1, 1), done.err
    assert slurm.calls("scancel") == ["101"]
    assert not (tmp_path / "runs/tiny").exists()


def test_where_slurm_does_not_say_whether_it_holds_a_job_that_is_said(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    (slurm.folder / "sbatch").write_text('#!/bin/sh\nrm "$1"; echo Submitted batch job 101\n')
    slurm.says("squeue", err="squeue: error: Unable to contact slurm controller (connect failure)\n", status=1)
    done = submit(tmp_path, slurm)
    assert (done.status, done.err.count("\n")) == (1, 1), done.err
    assert "holds a job" in done.err and "`squeue --me`" in done.err


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x85"])
def test_a_working_folder_with_a_control_character_in_its_name_is_refused(tmp_path: Path, slurm: FakeSlurm, character):
    folder = tmp_path / f"p{character}touch pwned{character}"
    folder.mkdir()
    write_files(folder)
    for more in ((), ("--dry-run",)):
        done = submit(folder, slurm, *more)
        assert done.status == 2 and not done.out and done.err.count("\n") == 1 and "touch pwned" in done.err
    assert not slurm.calls("sbatch") and not (folder / "runs").exists()


@pytest.mark.parametrize("folder", ["p%A_%a", "p%j", "12:00", "a\\b"])
def test_a_folder_that_slurm_or_python_would_take_for_something_else_is_refused(
    tmp_path: Path, slurm: FakeSlurm, folder: str
):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, f"runs_dir={folder}/runs")
    assert done.status == 2
    unfit = next(character for character in folder if character in "%:\\")
    assert f"runs_dir: {tmp_path}/{folder}/runs/tiny/launch has a {unfit} " in done.err
    assert slurm.calls("sbatch") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "site.yaml", "slurm", "text"]


def test_jobs_that_cannot_be_cancelled_are_named_and_stay_recorded(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    away = "error: Unable to contact slurm controller (connect failure)\n"
    slurm.says("sbatch", err=f"sbatch: {away}", status=1, call=3)
    slurm.says("scancel", err=f"scancel: {away}", status=1)
    done = submit(tmp_path, slurm)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "holds job 101, 102" in done.err
    assert "pipeline cancel runs/tiny" in done.err
    slurm.says("squeue", "101_0|PENDING|None|||tiny-prepare\n102|PENDING|None|||tiny-train\n")
    slurm.says("scancel")
    again = submit(tmp_path, slurm)
    assert (again.status, "already in the queue" in again.err) == (2, True), again.err
    assert pipeline(tmp_path, "cancel", "runs/tiny", slurm=slurm).out == "runs/tiny: cancelled job 101, 102\n"


def test_a_run_that_was_there_before_survives_a_refusal(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm).status == 0
    before = sorted(p.name for p in (tmp_path / "runs/tiny").iterdir())
    slurm.says("sbatch", err="sbatch: error: Unable to contact slurm controller\n", status=1, call=5)
    assert submit(tmp_path, slurm).status == 1
    assert slurm.calls("scancel") == ["104"]
    assert sorted(p.name for p in (tmp_path / "runs/tiny").iterdir()) == before
    jobs = json.loads((tmp_path / "runs/tiny/launch/jobs.json").read_text())["jobs"]
    assert [j["id"] for j in jobs] == ["101", "102", "103"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"acount": "me"}, "`account` at the top"),
        ({"python": "~/bin/python"}, "no shell expands ~"),
        ({"train": {"time_limit_min": 1}, "signal_before_end_s": 90}, "leaves no time"),
    ],
)
def test_a_wrong_site_file_is_refused_before_anything_is_written(tmp_path: Path, slurm: FakeSlurm, changes, words):
    write_files(tmp_path, site={**SITE, **changes})
    done = submit(tmp_path, slurm)
    assert done.status == 2
    assert words in done.err
    assert not (tmp_path / "runs").exists()
    assert slurm.calls("sbatch") == []


def test_the_global_batch_is_checked_against_the_processes_of_the_site(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path, site={**SITE, "train": {"nodes": 3}})
    done = submit(tmp_path, slurm)
    assert done.status == 2
    assert "2 x 3 = 6" in done.err


def test_a_runs_folder_that_cannot_be_made_is_one_message(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    (tmp_path / "runs").write_text("a file")
    done = submit(tmp_path, slurm)
    assert done.status == 1
    assert "cannot be written" in done.err
    assert "Traceback" not in done.err


def test_without_slurm_a_dry_run_works_and_a_submission_says_what_to_do(tmp_path: Path, monkeypatch):
    write_files(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").symlink_to("/usr/bin/git")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    arguments = ("submit", "config.yaml", "--site", "site.yaml")
    assert "#SBATCH --nodes=2" in pipeline(tmp_path, *arguments, "--dry-run").out
    done = pipeline(tmp_path, *arguments)
    assert done.status == 1
    assert "sbatch: not found" in done.err


@pytest.mark.timing
def test_submitting_costs_little_more_than_a_plain_interpreter(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert in_plain_starts(lambda: submit(tmp_path, slurm, "--dry-run").cpu_s) < 10
    assert in_plain_starts(lambda: submit(tmp_path, slurm).cpu_s, rounds=1) < 24


def test_submitting_imports_no_torch(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    probe = (
        "import sys\nfrom pipeline.cli.main import main\n"
        "sys.argv = ['pipeline', 'submit', 'config.yaml', '--site', 'site.yaml', 'name=other']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [m for m in ('torch', 'deepspeed', 'mlflow', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    assert (tmp_path / "runs/other").is_dir()
