"""What a job tells its submitter: each end once, whatever is requeued, and never at the cost of the job."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from pipeline.files import write_json
from pipeline.launch.job import attempt, beside, messages, requeue
from pipeline.launch.job.spec import Attempt, Task
from pipeline.launch.notify import send
from pipeline.launch.site import Site
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, RankFailed
from pipeline.run.events import EventLog, Finished, GaveUp, Spike, append
from pipeline.run.folder import Run
from pipeline.run.world import DEADLINE_VARIABLE
from tests.launch.notify.support import SECRET, Webhook, webhook, write_settings
from tests.launch.support import SITE, FakeSlurm, make_run


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with webhook() as made:
        yield made


@pytest.fixture
def first(tmp_path: Path, slurm: FakeSlurm, hook: Webhook, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attempt]:
    """The first attempt of job 7, which has begun, of a user with a webhook."""
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(requeue, "_KILLED_WITHIN_S", 0.0)
    made, _ = make_run(tmp_path, monkeypatch)
    file = write_settings(tmp_path / "home", webhook=hook.address)
    site = Site.model_validate(SITE)
    yield begun(Attempt("train", Task(str(made.path), ()), site, "7", "7", 0, "gpu[1-2]", file))
    signal.signal(signal.SIGTERM, handler)


def begun(now: Attempt) -> Attempt:
    attempts.note(now.run, AttemptBegan(**now.about(), nodes=now.nodes))
    return now


def rank_failed(now: Attempt, status: int = 1) -> Attempt:
    attempts.note(now.run, RankFailed(**now.about(), rank=1, host="gpu2", status=status))
    return now


def finish(run: Run) -> None:
    run.metrics_file.write_bytes(journal.encode({"step": 100, "time": 5.0, "train/loss": 2.34567}))
    append(run.events_file, Finished(step=100))


def test_training_that_finishes_is_told_with_its_step_and_loss_and_not_again_by_another_attempt(
    first: Attempt, hook: Webhook
):
    finish(first.run)
    assert attempt.end(first, EXIT_OK) == EXIT_OK
    assert attempt.end(begun(replace(first, number=1)), EXIT_OK) == EXIT_OK
    (told,) = hook.posted
    assert told["text"].startswith("tiny: finished") and "step 100, loss 2.3457" in told["text"]
    assert str(first.run.path.absolute()) in told["text"] and "job 7" in told["text"]


def test_metrics_that_cannot_be_read_do_not_change_how_the_job_ends(first: Attempt, hook: Webhook):
    finish(first.run)
    first.run.metrics_file.unlink()
    first.run.metrics_file.mkdir()
    assert attempt.end(first, EXIT_OK) == EXIT_OK
    assert len(hook.posted) == 1


def test_a_slice_or_an_evaluation_that_is_done_tells_nothing(first: Attempt, hook: Webhook):
    for stage in ("prepare", "evaluate"):
        attempt.end(begun(replace(first, stage=stage)), EXIT_OK)  # type: ignore[arg-type]  # a member of Stage
    assert hook.posted == []


def test_each_failed_attempt_is_told_and_the_last_one_gives_up(first: Attempt, hook: Webhook):
    for number in range(3):
        now = first if number == 0 else begun(replace(first, number=number))
        assert attempt.end(rank_failed(now), 1) == 1
    assert [text.partition(":")[2].split()[0] for text in hook.texts] == ["attempt", "attempt", "gave"]
    assert all("rank 1 on gpu2" in text for text in hook.texts)
    assert attempt.end(rank_failed(begun(replace(first, number=3))), 1) == 1
    assert len(hook.posted) == 3, "the job has given up before"


def test_a_stop_on_request_tells_nothing(first: Attempt, hook: Webhook):
    attempt.end(first, EXIT_STOPPED)
    assert hook.posted == []


def test_a_lost_node_is_told_by_the_attempt_after_it(first: Attempt, hook: Webhook, slurm: FakeSlurm):
    slurm.says("scontrol", "gpu1\ngpu2\n", call=1)
    slurm.says("sinfo", "gpu1|idle||\ngpu2|down*||\n")
    attempt.begin(replace(first, number=1))
    assert ["gpu2" in text and "attempt 0" in text for text in hook.texts] == [True]


def test_of_the_tasks_of_an_array_one_tells(first: Attempt, hook: Webhook):
    for task in range(4):
        now = replace(first, stage="prepare", job=f"9_{task}", raw_job=str(20 + task))
        assert attempt.end(rank_failed(begun(now), EXIT_USAGE), EXIT_USAGE) == EXIT_USAGE
    assert len(hook.posted) == 1 and "prepare" in hook.texts[0]
    assert len(EventLog.load(first.run.events_file).of(GaveUp)) == 4


def test_a_job_that_another_start_supersedes_tells_nothing(first: Attempt, hook: Webhook):
    from pipeline.run.events import StartBegan

    append(first.run.events_file, StartBegan(number=3, job=None, host="gpu9"))
    attempt.end(rank_failed(first), 1)
    assert hook.posted == []


def test_only_what_the_user_asked_for_is_told(first: Attempt, hook: Webhook):
    assert first.notify is not None
    write_settings(first.notify.parents[1], webhook=hook.address, on=["gave_up"])
    attempt.end(rank_failed(first), 1)
    assert hook.posted == []
    attempt.end(rank_failed(begun(replace(first, number=1)), EXIT_USAGE), EXIT_USAGE)
    assert len(hook.posted) == 1


@pytest.mark.parametrize("kind", ["dead", "refusing", "gone", "readable", "wrong"])
def test_a_message_that_cannot_be_sent_costs_seconds_and_one_line_and_changes_nothing(
    first: Attempt, hook: Webhook, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    slurm: FakeSlurm,
):  # fmt: skip
    monkeypatch.setattr(messages, "LIMIT_S", 0.5)
    assert first.notify is not None and send.LIMIT_S <= 5
    hook.status, hook.delay_s = 500, 60 if kind == "dead" else 0
    if kind == "gone":
        first.notify.unlink()
    if kind == "readable":
        first.notify.chmod(0o644)
    if kind == "wrong":
        write_settings(first.notify.parents[1], webhook=f"ftp://{SECRET}")
    began = time.monotonic()
    assert attempt.end(rank_failed(first), 1) == 1
    assert slurm.calls("scontrol")[-1] == "requeue 7"
    finish(first.run)
    assert attempt.end(begun(replace(first, number=1)), EXIT_OK) == EXIT_OK
    assert time.monotonic() - began < 10
    lines = [line for line in capsys.readouterr().err.splitlines() if "message" in line]
    assert len(lines) == 2 and all(line.startswith("pipeline: ") for line in lines)
    for path in (path for path in first.run.path.rglob("*") if path.is_file()):
        assert SECRET not in path.read_text(), path
    assert not any(SECRET in line for line in lines)


def test_a_job_at_its_time_limit_ends_without_a_message(first: Attempt, hook: Webhook, monkeypatch, capsys):
    monkeypatch.setenv(DEADLINE_VARIABLE, str(time.time() + 3))
    finish(first.run)
    assert attempt.end(first, EXIT_OK) == EXIT_OK
    assert hook.posted == [] and "time limit" in capsys.readouterr().err


def test_a_full_disk_is_told(first: Attempt, hook: Webhook, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    rank_failed(first)
    monkeypatch.setattr(journal, "append", full)
    attempt.end(first, 1)
    assert len(hook.posted) == 1


def spike(run: Run, step: int) -> None:
    append(run.events_file, Spike(step=step, loss="9.5", norm="3.0", batch=step - 1))


def test_spikes_are_told_while_training_runs_at_most_three_per_attempt_and_each_step_once(
    first: Attempt, hook: Webhook, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(beside, "_INTERVAL_S", 0.05)
    spike(first.run, 3)  # of an earlier start
    with beside.beside_training(first, journal.size(first.run.events_file)):
        spike(first.run, 10)
        end = time.monotonic() + 10
        while not hook.posted:
            assert time.monotonic() < end
            time.sleep(0.02)
        for step in (20, 30, 40, 50):
            spike(first.run, step)
    told = [re.search(r"step (\d+)", text) for text in hook.texts]
    assert [found[1] for found in told if found] == ["10", "20", "30"]
    assert "events.jsonl" in hook.texts[-1] and "9.5" in hook.texts[0]
    with beside.beside_training(begun(replace(first, number=1)), journal.size(first.run.events_file)):
        spike(first.run, 20)  # repeated after the restart
        spike(first.run, 60)
    assert ["step 60" in text for text in hook.texts[3:]] == [True]


def test_a_spike_just_before_the_end_is_told(first: Attempt, hook: Webhook):
    with beside.beside_training(first, journal.size(first.run.events_file)):
        spike(first.run, 10)
    assert len(hook.posted) == 1


def test_without_settings_nothing_is_read_and_nothing_is_told(first: Attempt, hook: Webhook):
    silent = replace(first, notify=None)
    with beside.beside_training(silent, 0):
        spike(first.run, 10)
    attempt.end(rank_failed(silent), 1)
    assert hook.posted == [] and attempts.every(first.run).of(attempts.Notified) == []


def test_the_file_of_a_job_names_the_settings(first: Attempt, tmp_path: Path):
    from pipeline.launch.job.spec import this_attempt

    content = {"stage": "train", "tasks": [{"run": "runs/tiny", "commands": []}], "site": SITE}
    for notify in (None, str(first.notify)):
        write_json(tmp_path / "train.json", {**content, "notify": notify} if notify else content)
        found = this_attempt(str(tmp_path / "train.json"), {"SLURM_JOB_ID": "7"}).notify
        assert found == (first.notify if notify else None)
