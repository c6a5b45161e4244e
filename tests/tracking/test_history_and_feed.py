"""The history of a run that is cut or rewound while the real feed reads it."""

import threading

from pipeline.run import journal
from pipeline.tracking import upload_state
from pipeline.tracking.history import History
from pipeline.tracking.upload.feed import Feed
from tests.tracking.keeping_store import URI, loss, of_file, train


class Listening:
    """A store of the real feed."""

    def __init__(self):
        self.points = set()

    def send_points(self, run_id, points):
        self.points |= {(p.key, p.step, p.time_ms / 1000, p.value) for p in points}
        return []


def feed_of(run, store):
    feed = Feed(run, run.config(), URI)
    return lambda: feed._send_metrics(store, "id", lambda _: False)


def test_an_uploader_that_reads_during_a_cut_sends_no_cut_line(run, ticks, monkeypatch):
    store = Listening()
    train(History(run, 0), 1, 20)
    real, uploaders = journal.replace, []

    def replace(path, lines):
        if path == run.metrics_file:  # the position is already lowered, the lines are still there
            uploaders.append(threading.Thread(target=feed_of(run, store)))
            uploaders[0].start()
            uploaders[0].join(0.3)
        real(path, lines)

    monkeypatch.setattr(journal, "replace", replace)
    history = History(run, 12)
    uploaders[0].join()
    monkeypatch.undo()
    train(history, 13, 20)
    feed_of(run, store)()
    assert store.points == of_file(run)


def test_a_line_read_before_its_retry_was_recorded_is_not_sent_under_the_old_key(run, ticks, monkeypatch):
    store = Listening()
    history = History(run, 0)
    train(history, 1, 18)
    send = feed_of(run, store)
    send()
    history.rewind(10)
    real = upload_state.settled

    def settled(run):
        found = real(run)
        monkeypatch.undo()
        train(history, 11, 18, lambda s: 2 * loss(s))
        return found

    monkeypatch.setattr(upload_state, "settled", settled)
    send()
    by_key = {}
    for key, step, _, value in store.points:
        assert by_key.setdefault((key, step), value) == value, "two values for one step"
    assert by_key["train/loss.retry1", 11] == 2 * loss(11)
