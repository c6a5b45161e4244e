"""How what waits on disk is cut into batches and rounds."""

from pipeline.tracking import journal
from pipeline.tracking.feed import Feed
from pipeline.tracking.store import Store, resolve_uri
from tests.tracking.support import begin, make_run


def test_memory_does_not_grow_with_what_waits(folder, monkeypatch):
    run, config = make_run(folder, "none")
    tracker = begin(run, config)
    line = {f"metric/{i}": float(i) for i in range(10)}
    with journal.Writer(run.metrics_file) as writer:
        writer.write(b"".join(journal.encode({"step": s, "time": float(s), **line}) for s in range(1, 5001)))
    tracker.close("FINISHED")
    sizes = []
    uri = resolve_uri(f"sqlite:///{folder}/mlflow.db")
    feed = Feed(run, config, uri)
    monkeypatch.setattr(Store, "send_points", lambda self, run_id, points: sizes.append(len(points)) or [])
    feed.send_all()
    assert sum(sizes) >= 50_000 and max(sizes) <= 1000


def test_lines_that_come_while_a_round_sends_wait_for_the_next_round(folder, monkeypatch):
    run, config = make_run(folder, "none")
    tracker = begin(run, config)
    for step in range(1, 21):
        tracker.log(step, {"train/loss": 1.0})
    feed = Feed(run, config, resolve_uri(f"sqlite:///{folder}/mlflow.db"))
    batches = []

    def training_goes_on(store, run_id, points):
        batches.append(len(points))
        tracker.log(20 + len(batches), {"train/loss": 1.0})
        assert len(batches) < 10, "the round goes on for as long as training does"
        return []

    monkeypatch.setattr(Store, "send_points", training_goes_on)
    assert feed.send_all() == 20
    assert feed.send_all() == 1
    assert batches == [20, 1]
    tracker.close("FINISHED")
