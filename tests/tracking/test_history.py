"""The history of a run with a store that, like MLflow, keeps every point it receives."""

import math
import random

import pytest

from pipeline.run import journal
from pipeline.tracking import upload_state
from pipeline.tracking.history import History
from tests.tracking.keeping_store import KeepingStore, loss, of_file, steps, train


def test_a_resume_cuts_lines_that_no_store_has(run, ticks):
    train(History(run, 0), 1, 20)
    history = History(run, 12)
    assert steps(run) == list(range(1, 13))
    assert history.reached == 20
    train(history, 13, 20)
    assert steps(run) == list(range(1, 21))


def test_published_lines_return_unchanged_when_their_steps_are_repeated(run, ticks):
    store = KeepingStore(run)
    train(History(run, 0), 1, 18)
    store.send()
    before = run.metrics_file.read_bytes()
    history = History(run, 10)
    assert steps(run) == list(range(1, 11))
    train(history, 11, 18)
    assert run.metrics_file.read_bytes() == before
    train(history, 19, 25)
    store.send()
    assert store.points == of_file(run)


def test_a_batch_in_flight_during_a_kill_counts_as_published(run, ticks):
    store = KeepingStore(run)
    train(History(run, 0), 1, 18)
    on_its_way = store.claim()
    history = History(run, 10)  # killed and resumed before the store answered
    store.arrive(on_its_way)
    train(history, 11, 25)
    store.send()
    assert store.points == of_file(run)


def test_a_published_line_whose_step_is_no_longer_logged_stays_in_the_history(run, ticks):
    store = KeepingStore(run)
    train(History(run, 0), 1, 18)
    store.send()
    history = History(run, 10)
    for step in range(12, 26, 3):  # resumed with another log_interval
        history.log(step, {"train/loss": loss(step)})
    store.send()
    assert store.points == of_file(run)
    assert steps(run) == [*range(1, 19), 21, 24]


def test_a_kill_after_a_checkpoint_but_before_the_next_line_loses_no_published_line(run, ticks):
    store = KeepingStore(run)
    train(History(run, 0), 1, 18)
    store.send()
    History(run, 10)  # resumed, reached a checkpoint at step 13, and was killed before a line was written
    train(History(run, 13), 14, 20)
    store.send()
    assert steps(run) == list(range(1, 21))
    assert store.points == of_file(run)


def test_a_different_rounding_of_a_repeated_step_agrees(run, ticks):
    store = KeepingStore(run)
    train(History(run, 0), 1, 18)
    store.send()
    train(History(run, 10), 11, 20, lambda s: loss(s) * (1 + 1e-6))  # another number of ranks
    store.send()
    assert store.points == of_file(run)
    assert upload_state.load(run).retries == []


def test_a_rollback_with_other_losses_gets_its_own_keys_and_no_step_has_two_values(run, ticks):
    store = KeepingStore(run)
    history = History(run, 0)
    train(history, 1, 18)
    store.send()
    history.rewind(10)
    train(history, 11, 30, lambda s: loss(s) if s < 15 else 0.9 * loss(s))  # the batch of step 15 was skipped
    store.send()
    retry = upload_state.load(run).retries[0]
    assert (retry.first_step, retry.last_step) == (15, 18)
    by_key = {}
    for key, step, _, value in store.points:
        assert by_key.setdefault((key, step), value) == value
    assert by_key["train/loss", 15] == loss(15) and by_key["train/loss.retry1", 15] == 0.9 * loss(15)
    assert by_key["train/loss", 19] == 0.9 * loss(19)
    # With each retry in place of what it superseded, MLflow has the final history.
    final = {(k, s): v for k, s, _, v in of_file(run)}
    for (key, step), value in final.items():
        assert by_key.get((f"{key}.retry1", step), by_key.get((key, step))) == value


def test_a_retry_that_could_not_be_recorded_is_recorded_when_the_line_is_logged_again(run, ticks, monkeypatch):
    store = KeepingStore(run)
    history = History(run, 0)
    train(history, 1, 18)
    store.send()
    history.rewind(10)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(upload_state, "update", full)
        history.log(11, {"train/loss": 9.0})
    history.log(11, {"train/loss": 9.0})
    assert [(r.first_step, r.last_step) for r in upload_state.load(run).retries] == [(11, 18)]


@pytest.mark.parametrize("first", [11, 20])
def test_a_rewind_that_could_not_be_made_is_made_before_the_next_line(run, ticks, monkeypatch, first: int):
    history = History(run, 0)
    train(history, 1, 18)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(upload_state, "update", full)
        with pytest.raises(OSError):
            history.rewind(10)
        with pytest.raises(OSError):
            history.log(first, {"train/loss": 9.0})
    train(history, first, 20)
    assert steps(run) == [*range(1, 11), *range(first, 21)]


def test_a_rollback_without_rewind_is_detected_by_a_lower_step(run, ticks):
    history = History(run, 0)
    train(history, 1, 18)
    train(history, 11, 20)
    assert steps(run) == list(range(1, 21))


def test_a_rollback_of_one_step_is_detected(run, ticks):
    history = History(run, 0)
    train(history, 1, 7)
    history.log(7, {"train/loss": 9.0})
    assert [line.record["train/loss"] for line in journal.read(run.metrics_file) if line.record["step"] == 7] == [9.0]


def test_a_nan_loss_agrees_with_itself(run, ticks):
    store = KeepingStore(run)
    history = History(run, 0)
    history.log(1, {"train/loss": math.nan})
    store.send()
    history.rewind(0)
    history.log(1, {"train/loss": math.nan})
    assert upload_state.load(run).retries == []
    assert len(steps(run)) == 1


@pytest.mark.parametrize("seed", range(30))
def test_after_any_sequence_of_kills_the_store_has_the_final_history_and_nothing_else(run, ticks, seed):
    chance = random.Random(seed)
    store = KeepingStore(run)
    checkpoint, pending = 0, None
    for _ in range(12):
        history = History(run, checkpoint)
        stop = checkpoint + chance.randint(1, 25)
        for step in range(checkpoint + 1, stop):
            if step % 3 == 0:
                history.log(step, {"train/loss": loss(step), "time/step_s": chance.random()})
            if step % 6 == 0:
                history.log(step, {"val/loss": loss(step)})
            if step % 7 == 0 and chance.random() < 0.8:
                checkpoint = step
            if chance.random() < 0.3:
                store.send(chance.choice([None, 60, 200]))
            if chance.random() < 0.1:
                pending = store.claim()
            if pending and chance.random() < 0.2:
                store.arrive(pending)
                pending = None
    if pending:
        store.arrive(pending)
    history = History(run, checkpoint)
    for step in range(checkpoint + 1, 400):
        if step % 3 == 0:
            history.log(step, {"train/loss": loss(step), "time/step_s": chance.random()})
        if step % 6 == 0:
            history.log(step, {"val/loss": loss(step)})
    store.send()
    assert store.points == of_file(run)
    assert steps(run) == list(range(3, 400, 3))
