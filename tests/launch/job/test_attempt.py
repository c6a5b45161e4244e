"""What follows an attempt: another one and on which nodes, or none; `end` runs as in a batch script on a fake Slurm."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE
from pipeline.launch.job import attempt, requeue
from pipeline.launch.job.causes import slurm_log
from pipeline.launch.job.spec import Attempt, Task
from pipeline.launch.site import Site
from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan, AttemptEnded, RankFailed, RankStopped
from pipeline.run.events import BadNode, EventLog, Finished, GaveUp, NodeLost, StartBegan, append
from pipeline.run.folder import Run, step_name
from pipeline.run.world import DEADLINE_VARIABLE
from tests.launch.support import SITE, FakeSlurm, make_run

FOUND = "cuda:1 multiplies matrices wrongly: 32 of 65536 elements"


def nodes(kind: str = "gpu:a100:8|ib", **states: str) -> str:
    """What sinfo prints of nodes of one kind."""
    return "".join(f"{name}|{state}|{kind}\n" for name, state in states.items())


def began(run: Run, number: int = 0, **requeue: int) -> Attempt:
    """An attempt on gpu1 and gpu2 that has begun."""
    site = Site.model_validate({**SITE, "requeue": requeue})
    now = Attempt("train", Task(str(run.path), ()), site, "7", "7", number, "gpu[1-2]", folder=run.launch)
    attempts.note(run, AttemptBegan(**now.about(), nodes=now.nodes, log_bytes=journal.size(slurm_log(now))))
    return now


def rank_ended(now: Attempt, status: int) -> Attempt:
    """The attempt, one of whose ranks has ended by itself."""
    attempts.note(now.run, RankFailed(**now.about(), rank=1, host="gpu2", status=status))
    return now


def reason_given_up(run: Run) -> str:
    (gave_up,) = EventLog.load(run.events_file).of(GaveUp)
    return gave_up.reason


def ended_in_preflight(run: Run, **requeue: int) -> Attempt:
    """An attempt of which gpu2 is bad; all ranks have ended with status 1."""
    now = began(run, **requeue)
    append(run.events_file, BadNode(nodes=["gpu2"], problems=[FOUND]))
    attempts.note(run, RankFailed(**now.about(), rank=0, host="gpu1", status=1))
    return now


@pytest.fixture
def run(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    handler = signal.getsignal(signal.SIGTERM)
    made, _ = make_run(tmp_path, monkeypatch)
    monkeypatch.setattr(requeue, "_KILLED_WITHIN_S", 0.0)  # no Slurm ends this process
    slurm.says("scontrol", "JobId=7 JobState=PENDING Partition=main NumNodes=2-2 ExcNodeList=(null)\n")
    slurm.says("scontrol", "gpu1\ngpu2\n", call=1)  # the names in the host list
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="idle", gpu3="idle"))
    yield made
    signal.signal(signal.SIGTERM, handler)  # a requeue ignores it, which children of this process would inherit


def test_the_retry_keeps_away_from_a_bad_node(run: Run, slurm: FakeSlurm):
    attempt.end(ended_in_preflight(run), 1)
    assert slurm.calls("scontrol")[1:] == [
        "requeue 7", "--oneliner show job 7", "update JobId=7 ExcNodeList=gpu2"
    ]  # fmt: skip


def test_the_reason_is_what_preflight_found_not_the_status_of_the_first_rank(run: Run):
    attempt.end(ended_in_preflight(run), 1)
    (ended,) = attempts.notes(run, "train").of(AttemptEnded)
    assert ended.reason == f"bad node gpu2: {FOUND}"


def test_a_node_is_not_excluded_where_too_few_would_be_left(run: Run, slurm: FakeSlurm, capsys):
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="idle"), call=2)  # the nodes of the partition
    attempt.end(ended_in_preflight(run), 1)
    assert not any("update" in call for call in slurm.calls("scontrol"))
    assert "gpu2 not excluded: only 1" in capsys.readouterr().err


def test_nodes_of_another_kind_do_not_count_as_replacements(run: Run, slurm: FakeSlurm, capsys):
    different = nodes("gpu:v100:8|ib", gpu3="idle", gpu4="idle") + nodes("gpu:a100:8|eth", gpu5="idle")
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="idle") + different, call=2)
    attempt.end(ended_in_preflight(run), 1)
    assert not any("update" in call for call in slurm.calls("scontrol"))
    assert "gpu2 not excluded: only 1" in capsys.readouterr().err


def test_a_site_may_leave_bad_nodes_in(run: Run, slurm: FakeSlurm):
    attempt.end(ended_in_preflight(run, exclude_lost_nodes=False), 1)
    assert slurm.calls("scontrol")[-1] == "requeue 7"


def test_a_retry_keeps_away_from_a_node_that_was_lost(run: Run, slurm: FakeSlurm):
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="down*"), call=1)  # the nodes of the attempt
    attempt.end(rank_ended(began(run), 137), 137)
    assert slurm.calls("scontrol")[-1] == "update JobId=7 ExcNodeList=gpu2"
    (lost,) = EventLog.load(run.events_file).of(NodeLost)
    assert lost.nodes == ["gpu2"]


def test_the_retry_of_a_retry_keeps_away_from_a_node_that_was_lost_even_when_it_is_back(run: Run, slurm: FakeSlurm):
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="down*"), call=1)
    began(run)  # Slurm kills it, and the batch script with it
    now = Attempt("train", Task(str(run.path), ()), Site.model_validate(SITE), "7", "7", 1, "gpu[1-2]")
    attempt.begin(now)
    slurm.says("scontrol", "gpu1\ngpu2\n", call=3)  # the names in the host list, once more
    attempt.end(now, EXIT_STOPPED)
    assert slurm.calls("scontrol")[-1] == "update JobId=7 ExcNodeList=gpu2"


def test_failures_without_progress_are_counted_and_lost_nodes_are_nobodys_failure(run: Run, slurm: FakeSlurm):
    slurm.says("scontrol", "gpu1\ngpu2\n")
    slurm.says("sinfo", nodes(gpu1="idle", gpu2="down*"), call=1)
    for number in range(3):
        attempt.end(rank_ended(began(run, number), 1), 1)
    assert slurm.calls("scontrol").count("requeue 7") == 3
    assert attempt.end(rank_ended(began(run, 3), 1), 1) == 1
    assert re.fullmatch(r"failed 3 times .*step 0 .*: rank 1 on gpu2 .*status 1", reason_given_up(run))
    assert slurm.calls("scontrol").count("requeue 7") == 3


def test_a_new_checkpoint_starts_the_count_anew(run: Run, slurm: FakeSlurm):
    for number in range(4):
        if number == 2:
            (run.checkpoints / step_name(5)).mkdir()
            (run.checkpoints / step_name(5) / "manifest.json").write_text("{}")
        attempt.end(rank_ended(began(run, number), 1), 1)
    assert slurm.calls("scontrol").count("requeue 7") == 4


def test_bad_usage_is_not_tried_again(run: Run, slurm: FakeSlurm):
    assert attempt.end(rank_ended(began(run), EXIT_USAGE), EXIT_USAGE) == EXIT_USAGE
    assert re.fullmatch(r"rank 1 on gpu2 .*status 2; .*not help", reason_given_up(run))
    assert "requeue 7" not in slurm.calls("scontrol")


def test_being_asked_to_stop_during_start_up_is_no_failure(run: Run, slurm: FakeSlurm):
    for number in range(5):
        now = began(run, number)
        attempts.note(run, RankStopped(**now.about(), rank=1, host="gpu2", status=EXIT_STOPPED))
        attempt.end(now, 143)  # srun has killed rank 0, which could not listen yet
    assert slurm.calls("scontrol").count("requeue 7") == 5


@pytest.mark.parametrize(("code", "requeues"), [(143, 3), (137, 2)])
def test_the_peers_of_a_rank_that_vanished_have_not_stopped_on_request(
    run: Run, slurm: FakeSlurm, code: int, requeues: int
):
    """A task that is killed as a whole leaves no record; srun reports it by its status and kills the other tasks."""
    for number in range(3):
        now = began(run, number)
        attempts.note(run, RankStopped(**now.about(), rank=1, host="gpu2", status=EXIT_STOPPED))
        attempt.end(now, code)
    assert slurm.calls("scontrol").count("requeue 7") == requeues


def test_a_stage_that_never_fits_its_time_limit_is_not_tried_for_ever(
    run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(DEADLINE_VARIABLE, str(time.time() + 3600))
    for number in range(5):  # preempted early
        attempt.end(began(run, number), EXIT_STOPPED)
    assert slurm.calls("scontrol").count("requeue 7") == 5
    monkeypatch.setenv(DEADLINE_VARIABLE, str(time.time()))
    for number in range(5, 7):
        attempt.end(began(run, number), EXIT_STOPPED)
    assert slurm.calls("scontrol").count("requeue 7") == 7
    assert attempt.end(began(run, 7), EXIT_STOPPED) == EXIT_STOPPED
    assert re.fullmatch(r".*time limit 3 times .*step 0 .*; .*time_limit_min .*", reason_given_up(run))


@pytest.mark.parametrize(
    ("job", "restart", "requeues"), [("7", 1, 1), ("7", 2, 0), ("8", 0, 0), (None, 0, 0)],
    ids=["its own start", "a later attempt of the job", "another job", "by hand"],
)  # fmt: skip
def test_a_job_whose_run_another_start_has_taken_over_is_not_requeued(
    run: Run, slurm: FakeSlurm, job: str | None, restart: int, requeues: int
):
    now = rank_ended(began(run, 1), 1)
    append(run.events_file, StartBegan(number=2, job="7", restart=1, host="gpu1"))
    append(run.events_file, StartBegan(number=3, job=job, restart=restart, host="gpu9"))
    if job != "7":
        append(run.events_file, Finished(step=100))  # of the other start: it says nothing about this job
    before = run.events_file.read_bytes()
    assert attempt.end(now, 1) == EXIT_FAILED
    assert slurm.calls("scontrol").count("requeue 7") == requeues
    if not requeues:
        assert run.events_file.read_bytes() == before
        assert "gpu9" in attempts.notes(run, "train").of(AttemptEnded)[-1].reason


def test_a_full_disk_costs_neither_the_requeue_nor_the_beginning(
    run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys
):
    now = began(run)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "append", full)
    assert attempt.begin(now) == "export PIPELINE_ATTEMPT=1\n"
    attempt.end(now, EXIT_STOPPED)
    assert slurm.calls("scontrol").count("requeue 7") == 1
    assert "No space left" in capsys.readouterr().err


def test_work_that_cannot_be_read_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "train.json").write_text("{")
    assert attempt.main(["end", str(tmp_path / "train.json"), "1"]) == 1
    assert "train.json: is not" in capsys.readouterr().err


def test_a_job_is_restarted_as_often_as_the_site_allows(run: Run, slurm: FakeSlurm):
    attempt.end(began(run, 1, max_restarts=2), EXIT_STOPPED)
    assert slurm.calls("scontrol").count("requeue 7") == 1
    assert attempt.end(began(run, 2, max_restarts=2), EXIT_STOPPED) == EXIT_STOPPED
    assert "restarted 2 times" in reason_given_up(run)
    assert slurm.calls("scontrol").count("requeue 7") == 1


def test_a_requeue_waits_for_a_controller_that_is_away(run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requeue, "_REQUEUE_WAIT_S", 0.01)
    for call in (2, 3):
        slurm.says("scontrol", err="scontrol: error: Unable to contact slurm controller\n", status=1, call=call)
    attempt.end(began(run), EXIT_STOPPED)
    assert slurm.calls("scontrol")[1:] == ["requeue 7"] * 3
