import pytest

from pipeline.run import journal
from pipeline.run.events import (
    EventLog,
    append,
    parse,
)
from pipeline.tracking.goodput import longest_silence_s, split
from tests.tracking.support import make_run


def event(at, kind, **fields):
    return {"time": float(at), "event": kind, **fields}


def log(*events):
    return EventLog(map(parse, events))


def attempt(began, at, step=0, reached=0, **fields):
    return event(at, "attempt", began=float(began), step=step, reached=reached, **fields)


def parts(*events, **more):
    found = split(log(*events), **more)
    return {name: value for name, value in found.parts().items() if value}


def test_an_undisturbed_run_is_queue_startup_training_and_checkpoints():
    assert parts(
        event(0, "submitted"),
        attempt(60, 70),
        event(75, "started", step=0),
        event(100, "checkpointed", step=10, stall_s=2.0),
        event(175, "finished", step=20, stall_s=1.0),
    ) == {"queue": 60, "startup": 15, "training": 97, "checkpoint": 3}


def test_the_summary_names_the_parts_of_at_least_a_second():
    found = split(
        log(event(0, "submitted"), attempt(60, 70), event(75, "started"), event(175, "finished", stall_s=3.0))
    )
    assert found.summary() == "55.4% of 2:55 (queue 1:00, startup 0:15, training 1:37, checkpoint 0:03)"


def test_steps_repeated_after_a_kill_are_not_progress_and_the_gap_is_idle():
    assert parts(
        attempt(0, 5),
        event(10, "started"),
        attempt(150, 152, step=100, reached=140, last_seen=110.0),
        event(160, "resumed"),
        event(180, "caught_up"),
        event(200, "finished"),
    ) == {"startup": 20, "training": 120, "repeated": 20, "idle": 40}


def test_a_requeue_by_the_scheduler_is_queue_time():
    assert parts(
        event(0, "submitted"),
        attempt(10, 11),
        event(12, "started"),
        event(100, "preempted"),
        attempt(160, 161, step=90, reached=90, requeued=True, last_seen=100.0),
        event(165, "resumed"),
        event(200, "finished"),
    ) == {"queue": 70, "startup": 7, "training": 123}


def test_starting_again_on_the_same_nodes_is_startup():
    assert parts(
        event(0, "submitted"),
        attempt(60, 70),
        event(75, "started"),
        event(103, "restarted"),
        attempt(108, 110, step=5, reached=5, last_seen=100.0, requeued=True, restart=2),
        event(120, "resumed"),
        event(220, "finished"),
    ) == {"queue": 60, "startup": 15 + 5 + 12, "training": 25 + 100, "idle": 3}


def test_a_run_is_idle_until_it_is_submitted_again():
    assert parts(
        attempt(0, 1),
        event(1, "started"),
        event(50, "failed"),
        event(80, "submitted"),
        attempt(100, 101, step=0, reached=0),
        event(101, "started"),
        event(120, "finished"),
    ) == {"queue": 20, "startup": 2, "training": 68, "idle": 30}


def test_an_evaluation_after_training_does_not_count():
    events = [attempt(0, 0), event(0, "started"), event(50, "finished")]
    later = [event(60, "requeued"), event(70, "gave_up"), event(80, "cancelled")]
    assert parts(*events, *later, now=100.0) == {"training": 50}
    assert parts(*events, *later, event(90, "submitted"), now=100.0) == {"training": 50, "idle": 40, "queue": 10}


def test_a_rollback_counts_as_repeated_until_it_has_caught_up():
    assert parts(
        attempt(0, 0),
        event(0, "started"),
        event(50, "rollback", step=30),
        event(50, "repeating", step=30, reached=45),
        event(55, "checkpointed", stall_s=1.0),
        event(70, "caught_up"),
        event(100, "finished"),
    ) == {"training": 80, "repeated": 20}


def test_a_second_rollback_before_catching_up_counts_every_second_once():
    assert parts(
        attempt(0, 0),
        event(10, "started"),
        event(110, "repeating", step=100, reached=150),
        event(150, "repeating", step=100, reached=150),
        event(210, "caught_up"),
        event(220, "finished"),
    ) == {"startup": 10, "training": 110, "repeated": 100}
    assert parts(
        attempt(0, 0, step=50, reached=100),
        event(10, "resumed"),
        event(110, "repeating", step=50, reached=100),
        event(120, "failed"),
    ) == {"startup": 10, "repeated": 110}


def test_a_run_that_died_while_repeating_and_again_before_its_first_step():
    assert parts(
        attempt(0, 1),
        event(2, "started"),
        attempt(110, 111, step=10, reached=80, last_seen=100.0),
        event(112, "resumed"),
        attempt(150, 151, step=10, reached=80, last_seen=140.0),
        event(160, "failed"),
    ) == {"startup": 14, "training": 98, "repeated": 28, "idle": 20}


def test_a_training_run_is_counted_to_its_last_line_or_to_now():
    events = log(attempt(0, 1), event(2, "started"))
    assert split(events, last_line=50.0).wall_s == 50
    assert split(events, last_line=50.0, now=60.0).wall_s == 60
    assert split(EventLog()) is None


def test_a_queued_run_is_counted_to_now():
    assert parts(event(0, "submitted"), now=30.0) == {"queue": 30}
    began = [event(0, "submitted"), attempt(10, 11), event(12, "started"), event(50, "preempted")]
    assert parts(*began, event(51, "requeued"), now=60.0) == {"queue": 19, "startup": 2, "training": 38, "idle": 1}
    assert parts(*began, event(51, "cancelled"), now=60.0) == {"queue": 10, "startup": 2, "training": 38, "idle": 1}


def test_prepare_jobs_are_startup_and_the_wait_between_stages_is_queue():
    events = [
        event(0, "submitted"),
        event(10, "prepare_began", slice="1/2"),
        event(12, "prepare_began", slice="2/2"),
        event(20, "prepare_ended", slice="1/2", done=True),
        event(21, "prepare_began", slice="2/2"),  # the first try of this slice was killed
        event(40, "prepare_ended", slice="2/2", done=True),
        attempt(45, 46),
        event(50, "started"),
        event(90, "finished"),
    ]
    assert parts(*events) == {"queue": 15, "startup": 35, "training": 40}
    failed = [*events[:5], event(40, "prepare_ended", slice="2/2", done=False)]
    assert parts(*failed, now=100.0) == {"queue": 10, "startup": 30}


def test_a_lost_node_ends_its_process_at_the_last_sign_of_life():
    lost = [
        event(0, "submitted"),
        attempt(10, 10),
        event(20, "started"),
        event(75, "node_lost", nodes=["n1"]),
        event(76, "requeued"),
    ]
    assert parts(*lost, last_line=60.0, now=100.0) == {"queue": 34, "startup": 10, "training": 40, "idle": 16}
    again = attempt(90, 91, step=5, reached=5, requeued=True, last_seen=60.0)
    assert parts(*lost, again, event(95, "resumed"), event(100, "finished")) == {
        "queue": 24, "startup": 15, "training": 45, "idle": 16,
    }  # fmt: skip


LOST = [attempt(0, 0), event(0, "started"), event(48, "checkpointed", step=90, stall_s=0.0)]
AGAIN = attempt(180, 182, step=90, reached=100, requeued=True, last_seen=50.0)


def test_the_time_in_which_a_lost_node_is_silent_is_no_training():
    silent = {"last_line": 50.0, "silence_s": 4.0}
    assert parts(*LOST, **silent, now=52.0) == {"training": 52}
    assert parts(*LOST, **silent, now=90.0) == {"training": 54, "idle": 36}
    assert parts(*LOST, **silent, now=150.0, queued=True) == {"training": 54, "queue": 96}
    ended = event(53, "failed", step=100, error="rank 1 on n2 does not answer")
    assert parts(*LOST, ended, **silent, now=90.0) == {"training": 53, "idle": 37}
    assert parts(*LOST, AGAIN, last_line=50.0, silence_s=4.0, now=185.0) == {"training": 50, "queue": 130, "startup": 5}


def test_wall_time_never_goes_back_while_a_node_is_lost_and_its_job_starts_again():
    walls = []
    for now in range(40, 260):
        events = [
            event for event in [*LOST, AGAIN, event(190, "resumed"), event(200, "caught_up")] if event["time"] <= now
        ]
        last_line = min(now, 50.0) if now < 200 else float(now)
        found = split(log(*events), last_line, float(now), queued=90 <= now < 175, silence_s=4.0)
        walls.append(found.wall_s)
        assert found.training_s <= 54 + max(0, now - 200)
    assert walls == [float(now) for now in range(40, 260)]


def test_a_process_may_be_silent_for_as_long_as_its_lines_lie_apart_and_a_few_steps(tmp_path):
    run, _ = make_run(tmp_path, "none")
    append(run.events_file, parse(attempt(1000, 1000)))
    assert longest_silence_s(run, EventLog.load(run.events_file)) is None
    for step, at in ((1, 1001.0), (10, 1010.0), (20, 1020.0)):
        journal.append(run.metrics_file, {"step": step, "time": at, "time/step_s": 1.0})
    assert longest_silence_s(run, EventLog.load(run.events_file)) == 13.0
    append(run.events_file, parse(attempt(1500, 1500, step=20, reached=20)))
    journal.append(run.metrics_file, {"step": 30, "time": 1510.0, "time/step_s": 2.0})
    assert longest_silence_s(run, EventLog.load(run.events_file)) == 16.0


def test_a_requeue_noticed_late_does_not_end_the_next_process():
    events = [
        attempt(0, 0),
        event(0, "started"),
        attempt(50, 50, requeued=True, last_seen=40.0),
        event(50, "resumed"),
        event(60, "requeued"),
    ]
    assert parts(*events, last_line=80.0, now=90.0) == {"queue": 10, "training": 80}


@pytest.mark.parametrize("count", range(1, 12))
def test_every_second_belongs_to_exactly_one_part(count):
    events = [
        event(0, "submitted"),
        attempt(5, 6),
        event(7, "started"),
        event(20, "checkpointed", stall_s=3.0),
        event(25, "preempted", stall_s=0.5),
        event(27, "requeued"),
        attempt(40, 41, step=5, reached=9),
        event(44, "resumed"),
        event(50, "caught_up"),
        event(55, "repeating"),
        event(60, "failed"),
    ]
    found = split(log(*events[:count]))
    assert all(v >= 0 for v in found.parts().values())
    assert found.wall_s == pytest.approx(events[:count][-1]["time"])


def test_a_repeat_of_no_length_hides_no_stall():
    events = [event(0, "submitted"), attempt(10, 10), event(10, "started"), event(40, "repeating")]
    assert parts(*events, event(40, "failed", stall_s=3.0)) == {"queue": 10, "training": 27, "checkpoint": 3}
