"""Decays: a stable run, and a run of its own from each of some of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.checkpoint.pins import pin, pins, unpin
from pipeline.config.load import load_config
from pipeline.run.folder import Run
from pipeline.run.related import read_branches
from tests.launch.submit.dry_runs import WSD
from tests.launch.support import FakeSlurm, submit, write_files

AT = ("--decay-at", "40,80,100", *WSD)


def jobs(run: Path) -> list[str]:
    """The ids of the jobs of a run."""
    return [job["id"] for job in json.loads((run / "launch/jobs.json").read_text())["jobs"]]


def script(run: Path, job: str) -> str:
    return (run / f"launch/{job}_submission.sh").read_text()


def published(run: Path, *steps: int) -> None:
    state = {"config": load_config(run.parent.parent / "config.yaml", WSD).model_dump(mode="json")}
    for step in steps:
        folder = run / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"state": state}))


def test_each_decay_waits_for_the_stable_run_with_its_checkpoint_pinned(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, *AT)
    assert done.status == 0, done.err
    stable = tmp_path / "runs/tiny"
    assert jobs(stable) == ["101", "102", "103"]
    for number, step in enumerate((40, 80, 100)):
        run = tmp_path / f"runs/tiny-decay-{step}"
        train, evaluate = jobs(run)
        assert (train, evaluate) == (str(104 + 2 * number), str(105 + 2 * number))
        assert "--dependency=afterok:102\n" in script(run, train) and "--kill-on-invalid-dep=yes" in script(run, train)
        assert f"--dependency=afterok:{train}\n" in script(run, evaluate)
        config = load_config(run / "config.yaml").model_dump()
        assert config["init"] == {"from": "runs/tiny", "step": step, "what": "all"}
        assert (config["train"]["max_iters"], config["optimizer"]["schedule"]) == (step + 10, "wsd")
        assert f"when step {step} is saved" in done.out
    optimizer = load_config(stable / "config.yaml").optimizer
    assert (optimizer.schedule, optimizer.decay_iters) == ("constant", None)
    found = pins(stable / "checkpoints")
    assert [(one.checkpoint.name, Path(one.holder).name, one.dead) for one in found] == [
        (f"step_{step:08d}", f"tiny-decay-{step}", None) for step in (40, 80, 100)
    ]
    assert [branch.step for branch in read_branches(Run(stable))] == [40, 80, 100]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("optimizer.schedule=constant", "optimizer.decay_iters=null"), "given constant, needed: wsd"),
        (("checkpoint.if_busy=skip",), "set wait"),
        (("train.max_iters=60",), "80: is beyond train.max_iters = 60"),
        (("train.checkpoint_interval=30",), "40: no checkpoint is saved there; allowed: multiples"),
        (("optimizer.warmup_iters=50",), "40: is within the warm-up"),
        (("--decay-at", "40,40"), "40: is there twice"),
        (("--decay-at", "40,x"), "numbers from 1"),
        (("--decay-at", "0"), "numbers from 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, slurm: FakeSlurm, more: tuple[str, ...], words: str):
    write_files(tmp_path)
    done = submit(tmp_path, slurm, *AT, *more)
    assert done.status == 2 and words in done.err, done.err
    assert not slurm.calls("sbatch") and not (tmp_path / "runs").exists()


def test_a_decay_whose_checkpoint_is_there_waits_for_nothing(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    published(tmp_path / "runs/tiny", 20, 40)
    assert submit(tmp_path, slurm, *AT).status == 0
    runs = {step: tmp_path / f"runs/tiny-decay-{step}" for step in (40, 80)}
    assert "dependency" not in script(runs[40], jobs(runs[40])[0])
    assert "--dependency=afterok:102\n" in script(runs[80], jobs(runs[80])[0])


def test_a_checkpoint_that_is_gone_is_named(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    published(tmp_path / "runs/tiny", 60, 80, 100)
    done = submit(tmp_path, slurm, *AT)
    assert done.status == 2 and "--decay-at 40: runs/tiny has trained past it" in done.err and "60, 80, 100" in done.err
    assert not slurm.calls("sbatch")


def test_what_is_done_is_skipped_and_a_longer_run_gets_more_decays(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    assert submit(tmp_path, slurm, *AT).status == 0
    published(tmp_path / "runs/tiny", 40, 80, 100)
    for step in (40, 80, 100):
        published(tmp_path / f"runs/tiny-decay-{step}", step + 10)
    for number in range(10, 20):
        slurm.says("sbatch", f"Submitted batch job {100 + number}\n", call=number)
    for step in (40, 80, 100):  # their first saves have removed their pins
        unpin(tmp_path / "runs/tiny/checkpoints", tmp_path / f"runs/tiny-decay-{step}")
    done = submit(tmp_path, slurm, *WSD, "--decay-at", "40,80,100,200", "train.max_iters=200")
    assert done.status == 0, done.err
    assert done.out.count("train     skipped: step") == 3 and "when step 200 is saved" in done.out
    assert [branch.step for branch in read_branches(Run(tmp_path / "runs/tiny"))] == [40, 80, 100, 200]
    assert [one.checkpoint.name for one in pins(tmp_path / "runs/tiny/checkpoints")] == ["step_00000200"]


def test_a_refusal_in_the_middle_leaves_no_job_no_folder_and_no_pin(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    published(tmp_path / "runs/tiny", 20, 40)
    other = pin(tmp_path / "runs/tiny/checkpoints/step_00000020", tmp_path / "runs/other")
    slurm.says("sbatch", err="sbatch: error: invalid partition specified: nope\n", status=1, call=6)
    done = submit(tmp_path, slurm, *AT)
    assert done.status == 2
    assert slurm.calls("scancel") == ["101 102 103 104 105"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    assert [one.file for one in pins(tmp_path / "runs/tiny/checkpoints")] == [other]
    assert read_branches(Run(tmp_path / "runs/tiny")) == []


def test_each_run_of_a_sweep_has_its_decays(tmp_path: Path, slurm: FakeSlurm):
    write_files(tmp_path)
    for number in range(10, 20):
        slurm.says("sbatch", f"Submitted batch job {100 + number}\n", call=number)
    done = submit(tmp_path, slurm, "--decay-at", "40,80", *WSD, "--sweep", "train.seed=1,2", "--max-parallel", "1")
    assert done.status == 0, done.err
    [home] = tmp_path.glob("runs/tiny-sweep-*")
    assert "--array=0-1%1\n" in script(home, "102")
    waiting = {
        f"{seed}-{step}": script(run := tmp_path / f"runs/tiny-seed-{seed}-decay-{step}", jobs(run)[0])
        for seed in (1, 2) for step in (40, 80)
    }  # fmt: skip
    for name, text in waiting.items():
        assert f"--dependency=afterok:102_{int(name[0]) - 1}\n" in text
