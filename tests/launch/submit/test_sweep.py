"""A sweep: one array a stage, a run folder for every value, and a folder of its own for the jobs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.launch.support import FakeSlurm, submit, write_files

RATES = ("--sweep", "optimizer.learning_rate=1e-2,3e-3")
SEEDS = ("--sweep", "train.seed=1,2")


def homes(folder: Path) -> list[Path]:
    """Where the files of the jobs of each sweep are."""
    return sorted(folder.glob("runs/tiny-sweep-*"))


def test_a_sweep_is_one_array_and_a_run_folder_for_every_value(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, "--sweep", "optimizer.learning_rate=1e-2,3e-3", "--sweep", "train.seed=1,2")
    assert done.status == 0, done.err
    names = sorted(p.name for p in (tmp_path / "runs").glob("*-seed-*"))
    assert names == [f"tiny-learning_rate-{rate}-seed-{seed}" for rate in ("1e_2", "3e_3") for seed in (1, 2)]
    [home] = homes(tmp_path)
    for subcommand in ("status", "report", "cancel"):
        assert f"pipeline {subcommand} runs/{home.name}\n" in f"{done.out}\n", "one command for all of them"
    assert "#SBATCH --array=0-3%4" in (home / "launch/102_submission.sh").read_text()
    assert "aftercorr:102" in (home / "launch/103_submission.sh").read_text()
    codes = {(tmp_path / "runs" / name / "code/pipeline/__init__.py").stat().st_ino for name in (*names, home.name)}
    assert len(codes) == 1, "the runs of a sweep share one copy of the code"
    for index, name in enumerate(names):
        jobs = json.loads((tmp_path / "runs" / name / "launch/jobs.json").read_text())["jobs"]
        assert [j["id"] for j in jobs] == ["101", f"102_{index}", f"103_{index}"]
        config = (tmp_path / "runs" / name / "config.yaml").read_text()
        assert f"seed: {1 + index % 2}" in config
        assert f"learning_rate: {(0.01, 0.003)[index // 2]}" in config


def test_a_sweep_trains_at_most_so_many_runs_at_a_time(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, "--sweep", "train.seed=1,2,3,4", "--max-parallel", "2", "--dry-run")
    assert "#SBATCH --array=0-3%2\n" in done.out and "#SBATCH --array=0-3%4\n" in done.out, "train, evaluate"
    refused = submit(tmp_path, slurm, "--max-parallel", "2")
    assert refused.status == 2 and "--sweep" in refused.err and not slurm.calls("sbatch")


CSV = "optimizer.learning_rate, train.seed\n1e-2, 1\n3e-3,\n"
YAML = "- {name: fast, optimizer.learning_rate: 1e-2, train.seed: 1}\n- {name: slow, optimizer.learning_rate: 3e-3}\n"


@pytest.mark.parametrize(
    ("file", "text", "labels"),
    [
        ("rows.csv", CSV, ("learning_rate-1e_2-seed-1", "learning_rate-3e_3")),
        ("rows.yaml", YAML, ("fast", "slow")),
    ],
)
def test_the_rows_of_a_file_are_runs(tmp_path: Path, slurm: FakeSlurm, file: str, text: str, labels: tuple[str, str]):
    write_files(tmp_path)
    (tmp_path / file).write_text(text)
    done = submit(tmp_path, slurm, "--sweep", file, "--sweep", "train.zero_stage=0,1")
    assert done.status == 0, done.err
    names = [f"tiny-{label}-zero_stage-{stage}" for label in labels for stage in (0, 1)]
    [home] = homes(tmp_path)
    swept = json.loads((home / "sweep.json").read_text())["runs"]
    assert [run["name"] for run in swept] == names
    assert [float(run["values"]["optimizer.learning_rate"]) for run in swept] == [0.01, 0.01, 0.003, 0.003]
    assert [run["values"].get("train.seed") for run in swept] == ["1", "1", None, None], "empty: the config's own"
    configs = [(tmp_path / "runs" / name / "config.yaml").read_text() for name in names]
    assert ["seed: 1\n" in config for config in configs] == [True, True, False, False]
    for command in ("status", "cancel", "report"):
        assert f"pipeline {command} runs/{home.name}\n" in done.out + "\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("train.seed\n", "no rows"),
        ("train.seed,train.seed\n1,2\n", "twice"),
        ("train.seed\n1,2\n", "row 1 has 2 cells"),
        ("--me\n1\n", "not a dotted key"),
        ('train.seed\n"1\n', "unexpected end"),
        ("name,train.seed\na,1\na,2\n", "both be called tiny-a"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path, slurm: FakeSlurm, text: str, words: str):
    write_files(tmp_path)
    (tmp_path / "rows.csv").write_text(text)
    done = submit(tmp_path, slurm, "--sweep", "rows.csv")
    assert done.status == 2 and words in done.err and done.err.count("\n") == 1, done.err
    (tmp_path / "rows.yaml").write_text("a: 1\n")
    assert "is no list of mappings" in submit(tmp_path, slurm, "--sweep", "rows.yaml").err
    assert "cannot be read" in submit(tmp_path, slurm, "--sweep", "none.csv").err
    assert not (tmp_path / "runs").exists()


def test_what_is_wrong_in_any_row_is_said_at_once(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, "--sweep", "train.batch_size=16,18", "--sweep", "model.num_heads=2,3")
    assert done.status == 2
    assert "(run tiny-batch_size-18-num_heads-2)" in done.err and "(run tiny-batch_size-16-num_heads-3)" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("optimizer.learning_rate", "dotted.key=value,value"),
        ("optimizer.learning_rate=1,,2", "dotted.key=value,value"),
        ("train.seed=1,1", "names a value twice"),
        ("runs_dir=a,b", "set runs_dir without --sweep"),
        ("train.sed=1,2", "did you mean `seed`"),
        ("model.vocab_size=257,300", "shares one dataset"),
        ("sample.prompt=a b,a-b", "both be called tiny-prompt-a_b"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(tmp_path: Path, slurm: FakeSlurm, sweep: str, words: str):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, "--sweep", sweep)
    assert done.status == 2
    assert words in done.err
    assert not (tmp_path / "runs").exists()


def test_a_key_that_is_swept_twice_is_refused(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    (tmp_path / "rows.csv").write_text("train.seed,optimizer.learning_rate\n3,1e-3\n")
    for second in ("train.seed=3", "rows.csv"):
        done = submit(tmp_path, slurm, "--sweep", "train.seed=1,2", "--sweep", second)
        assert done.status == 2 and "train.seed is given twice" in done.err
    assert not (tmp_path / "runs").exists()


def test_a_second_sweep_of_the_config_leaves_the_work_of_the_first_alone(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, *RATES).status == 0
    [first] = homes(tmp_path)
    before = (first / "launch/train.json").read_bytes()
    done = submit(tmp_path, slurm, *SEEDS)
    assert done.status == 0, done.err
    assert (first / "launch/train.json").read_bytes() == before
    [second] = [home for home in homes(tmp_path) if home != first]
    for home, job, key in ((first, "102", "learning_rate"), (second, "105", "seed")):
        script = (home / f"launch/{job}_submission.sh").read_text()
        assert f"attempt begin {home}/launch/train.json" in script
        assert f"--job-name={home.name}-train" in script
        tasks = json.loads((home / "launch/train.json").read_text())["tasks"]
        assert all(f"tiny-{key}-" in task["run"] for task in tasks)


def test_a_sweep_in_the_queue_is_not_submitted_again_even_if_its_run_folders_are_gone(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, *SEEDS).status == 0
    [home] = homes(tmp_path)
    slurm.says("squeue", f"102_1|PENDING|None|||{home.name}-train\n")
    done = submit(tmp_path, slurm, *SEEDS)
    assert done.status == 2
    assert "runs/tiny-seed-1: " in done.err and "queue as job 102_0" in done.err
    for run in tmp_path.glob("runs/tiny-seed-*"):
        shutil.rmtree(run)
    done = submit(tmp_path, slurm, *SEEDS)
    assert done.status == 2
    assert f"runs/{home.name}: " in done.err and "queue as job 102" in done.err and "`scancel 102`" in done.err
    assert len(slurm.calls("sbatch")) == 3


def test_a_refused_sweep_leaves_nothing(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    slurm.says("sbatch", err="sbatch: error: invalid partition specified: nope\n", status=1, call=3)
    assert submit(tmp_path, slurm, *SEEDS).status == 2
    assert slurm.calls("scancel") == ["101 102"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_evaluation_after_slices_waits_for_all_of_them(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    for seed in (1, 2):  # trained; the tokens were removed since
        checkpoint = tmp_path / f"runs/tiny-seed-{seed}/checkpoints/step_00000100"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    done = submit(tmp_path, slurm, "--dry-run", *SEEDS)
    assert "### train" not in done.out
    assert "#SBATCH --dependency='afterok:<prepare>'" in done.out and "aftercorr" not in done.out
