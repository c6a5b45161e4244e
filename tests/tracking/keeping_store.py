"""A store that, like MLflow, keeps every point it receives, and a training that is only its numbers."""

import random

from pipeline.run import journal
from pipeline.tracking import upload_state

URI = "memory"


class KeepingStore:
    """Keeps one of each (key, step, time, value), as MLflow does."""

    def __init__(self, run):
        self.run = run
        self.points = set()

    def claim(self, bytes_limit=None):
        """Begins to send: records the position before anything arrives."""
        s = upload_state.load(self.run)
        begin, batch, end = s.of(URI).sent, [], s.of(URI).sent
        for line in journal.read(self.run.metrics_file, begin):
            if bytes_limit is not None and line.end - begin > bytes_limit:
                break
            retry = s.retry_number(line.record["step"])
            batch += [
                (k + (f".retry{retry}" if retry else ""), line.record["step"], line.record["time"], v)
                for k, v in line.record.items()
                if k not in ("step", "time")
            ]
            end = line.end

        def note(s):
            s.of(URI).sending = max(s.of(URI).sending, end)

        upload_state.update(self.run, note)
        return s.generation, batch, end

    def arrive(self, claim):
        generation, batch, end = claim
        self.points |= set(batch)

        def note(s):
            if s.generation == generation:
                s.of(URI).sent = max(s.of(URI).sent, end)

        upload_state.update(self.run, note)

    def send(self, bytes_limit=None):
        self.arrive(self.claim(bytes_limit))


def of_file(run):
    return {
        (k, line.record["step"], line.record["time"], v)
        for line in journal.read(run.metrics_file)
        for k, v in line.record.items()
        if k not in ("step", "time")
    }


def loss(step):
    return 5.0 / step


def train(history, first, last, results=loss):
    for step in range(first, last + 1):
        history.log(step, {"train/loss": results(step), "time/step_s": random.random()})
        if step % 5 == 0:
            history.log(step, {"val/loss": results(step) + 1})


def steps(run):
    return [line.record["step"] for line in journal.read(run.metrics_file) if "train/loss" in line.record]
