"""A checkpoint's evaluation is submitted once, at a lower priority, and says nothing of the run itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint.pins import pins
from pipeline.errors import EXIT_FAILED, EXIT_OK
from pipeline.files import write_text
from pipeline.launch.job import attempt as module
from pipeline.launch.job.beside import beside_training
from pipeline.launch.job.evaluations import submit_evaluations
from pipeline.launch.job.spec import Attempt, Task, this_attempt
from pipeline.launch.site import Site
from pipeline.launch.slurm import job_records
from pipeline.launch.watch.cancel import cancel
from pipeline.run import attempts
from pipeline.run.attempts import AttemptBegan
from pipeline.run.events import EventLog
from pipeline.run.folder import step_name
from tests.launch.support import SITE, FakeSlurm, make_run
from tests.processes import wait_until

TASKS = "evaluate: {tasks: [hellaswag, arc_easy], num_fewshot: 5, every_checkpoint: true}\n"


@pytest.fixture
def training(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """The first attempt of job 7, which trains a run with the checkpoints of steps 10 and 20."""
    run, _ = make_run(tmp_path, monkeypatch)
    write_text(run.config_file, run.config_text().replace("evaluate:\n", TASKS + "unused:\n").split("unused:")[0])
    for step in (10, 20):
        (run.checkpoints / step_name(step)).mkdir(parents=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return Attempt("train", Task(str(run.path), ()), Site.model_validate(SITE), "7", "7", 0, "gpu[1-2]")


def script(training: Attempt) -> str:
    """The newest batch script."""
    return max(training.run.launch.glob("*submission*.sh"), key=lambda file: file.stat().st_mtime_ns).read_text()


def test_each_checkpoint_gets_one_job_whatever_is_requeued(training: Attempt, slurm: FakeSlurm):
    submit_evaluations(training)
    assert len(slurm.calls("sbatch")) == 2 and "#SBATCH --nice=10000" in script(training)
    spec = json.loads((training.run.launch / "evaluate_step_00000010.json").read_text())
    assert spec["tasks"][0]["commands"] == [
        ["evaluate", "runs/tiny", "--tasks", "hellaswag,arc_easy", "--num-fewshot", "5", "--step", "10"]
    ]
    assert {pin.checkpoint.name for pin in pins(training.run.checkpoints)} == {"step_00000010", "step_00000020"}
    assert [job.name for job in job_records.evaluation_jobs(training.run)] == ["tiny-evaluate-10", "tiny-evaluate-20"]
    assert job_records.jobs(training.run) == []  # they are no part of the chain
    submit_evaluations(replace(training, number=1))
    assert len(slurm.calls("sbatch")) == 2
    (training.run.checkpoints / step_name(30)).mkdir()
    (training.run.checkpoints / step_name(100)).mkdir()  # the last step: the evaluation after training does it
    submit_evaluations(training)
    assert len(slurm.calls("sbatch")) == 3


def test_a_refused_job_is_submitted_at_the_next_look(
    training: Attempt, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    slurm.says("sbatch", err="sbatch: error: Unable to contact slurm controller", status=1, call=1)
    with beside_training(training, 0):  # one look when it begins and one when it has ended
        assert wait_until(lambda: len(slurm.calls("sbatch")) == 1, 10)
    assert len(slurm.calls("sbatch")) == 3
    assert capsys.readouterr().err.count("is not submitted yet") == 1


def test_without_every_checkpoint_nothing_is_submitted(training: Attempt, slurm: FakeSlurm):
    run = training.run
    write_text(run.config_file, run.config_text().replace("every_checkpoint: true", "every_checkpoint: false"))
    with beside_training(training, 0):
        pass
    assert slurm.calls("sbatch") == []


def test_what_happens_to_such_a_job_is_no_event_of_the_run(
    training: Attempt, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    submit_evaluations(training)
    own = this_attempt(str(training.run.launch / "evaluate_step_00000010.json"), {"SLURM_JOB_ID": "101"})
    assert own.beside and own.stage == "evaluate"
    assert module.begin(own) is not None
    monkeypatch.setattr(module, "requeue", lambda *given: False)
    assert module.end(own, EXIT_FAILED) == EXIT_FAILED
    assert module.end(replace(own, number=1), EXIT_OK) == EXIT_OK
    assert not EventLog.load(training.run.events_file)
    assert [note.job for note in attempts.every(training.run).of(AttemptBegan)] == ["101"]


def test_cancelling_the_run_cancels_them_and_lets_the_checkpoints_go(training: Attempt, slurm: FakeSlurm):
    submit_evaluations(training)
    slurm.says("squeue", "101|PENDING|Priority|||tiny-evaluate-10\n102|PENDING|Priority|||tiny-evaluate-20\n")
    assert cancel(training.run) == ["101", "102"]
    assert slurm.calls("scancel") == ["101 102"] and not pins(training.run.checkpoints)
    assert not EventLog.load(training.run.events_file)
