"""A decay is released by the job of its stable run when its checkpoint is published: once, and whatever happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.launch.job.branches import release
from pipeline.launch.slurm import job_records
from pipeline.launch.slurm.client import SlurmError
from pipeline.launch.slurm.job_records import Job
from pipeline.run.events import BranchReleased, EventLog
from pipeline.run.folder import Run
from pipeline.run.related import Branch, add_branches
from tests.launch.support import FakeSlurm, make_run

UPDATES = [f"update JobId={job} Dependency=" for job in ("104", "106")]


@pytest.fixture
def stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with decays from its steps 4 and 8, whose jobs 104 and 106 wait."""
    run, _ = make_run(tmp_path, monkeypatch)
    for step, job in ((4, "104"), (8, "106")):
        branch = Run(run.path.with_name(f"decay-{step}"))
        branch.launch.mkdir(parents=True)
        add_branches(run, [Branch(step, branch)])
        job_records.add_jobs(branch, [Job(job, "train", 1, 5.0, "here", True, name=f"decay-{step}-train")])
    return run


def publish(run: Run, step: int) -> None:
    folder = run.checkpoints / f"step_{step:08d}"
    folder.mkdir()
    (folder / "manifest.json").touch()


def says_pending(slurm: FakeSlurm, *jobs: str) -> None:
    names = {"104": "decay-4", "106": "decay-8"}
    slurm.says("squeue", "".join(f"{job}|PENDING|Dependency|||{names[job]}-train\n" for job in jobs))


def test_a_decay_is_released_once_when_its_checkpoint_is_published(stable: Run, slurm: FakeSlurm):
    says_pending(slurm, "104", "106")
    started: set[str] = set()
    release(stable, started)
    assert slurm.calls("squeue") == slurm.calls("scontrol") == [], "nothing is asked of Slurm before"
    publish(stable, 4)
    for _ in range(3):
        release(stable, started)
    assert slurm.calls("scontrol") == UPDATES[:1] and len(slurm.calls("squeue")) == 1
    publish(stable, 8)
    release(stable, started)
    assert slurm.calls("scontrol") == UPDATES
    found = EventLog.load(stable.events_file).of(BranchReleased)
    assert [(event.step, event.run, event.job) for event in found] == [(4, "decay-4", "104"), (8, "decay-8", "106")]


def test_the_next_attempt_releases_what_the_killed_one_could_not_and_nothing_twice(stable: Run, slurm: FakeSlurm):
    says_pending(slurm, "104", "106")
    publish(stable, 4)
    release(stable, set())
    publish(stable, 8)  # the node died before the next look; 104 may have been requeued and be waiting again
    release(stable, set())
    assert slurm.calls("scontrol") == UPDATES


def test_while_the_controller_is_away_a_decay_is_tried_again(stable: Run, slurm: FakeSlurm):
    says_pending(slurm, "104")
    publish(stable, 4)
    slurm.says("scontrol", err="error: Unable to contact slurm controller\n", status=1, call=1)
    started: set[str] = set()
    with pytest.raises(SlurmError):
        release(stable, started)
    release(stable, started)
    assert slurm.calls("scontrol") == UPDATES[:1] * 2 and started == {"decay-4"}


@pytest.mark.parametrize("queue", ["", "104|RUNNING|None|n1||decay-4-train\n", "104|PENDING|Priority|||other-train\n"])
def test_a_decay_that_runs_or_was_cancelled_is_left_alone(stable: Run, slurm: FakeSlurm, queue: str):
    slurm.says("squeue", queue)
    publish(stable, 4)
    release(stable, started := set())
    assert slurm.calls("scontrol") == [] and started == {"decay-4"}


def test_a_decay_that_is_not_submitted_yet_is_looked_at_again(stable: Run, slurm: FakeSlurm):
    says_pending(slurm, "104")
    publish(stable, 4)
    jobs_file = Run(stable.path.with_name("decay-4")).jobs_file
    content = jobs_file.read_bytes()
    jobs_file.unlink()
    release(stable, started := set())
    assert slurm.calls("squeue") == [] and not started
    jobs_file.write_bytes(content)
    release(stable, started)
    assert slurm.calls("scontrol") == UPDATES[:1]
