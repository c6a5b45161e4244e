"""Records runs without training, and reads them back from MLflow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import tracking
from pipeline.config.load import parse_config
from pipeline.config.sections import Config
from pipeline.files import write_json
from pipeline.run import journal
from pipeline.run.evaluations import evaluation_file
from pipeline.run.folder import Run, create_run
from pipeline.tracking import upload_state
from pipeline.tracking.upload.store import Point, Store

CONFIG = """
name: try
runs_dir: "{folder}/runs"
data: {{path: "{folder}/tokens", sources: [{{name: a, paths: ["{folder}/text/*.txt"]}}], validation_fraction: 0.2}}
tokenizer: {{kind: bytes}}
model: {{vocab_size: 300, context_length: 16, d_model: 16, num_layers: 1, num_heads: 2, d_ff: 32}}
optimizer: {{learning_rate: 1.0e-3, min_learning_rate: 1.0e-4, warmup_iters: 5, cosine_cycle_iters: 300}}
train: {{batch_size: 4, micro_batch_size: 4, max_iters: 300, log_interval: 5, val_interval: 50, num_val_batches: 1,
         checkpoint_interval: 25}}
tracking: {{uri: "{uri}", artifact_location: "{folder}/artifacts", experiment: tests}}
"""

Points = dict[str, list[tuple[int, int, float]]]


def config_text(folder: Path, uri: str | None = None) -> str:
    return CONFIG.format(folder=folder, uri=uri or f"sqlite:///{folder}/mlflow.db")


def make_run(folder: Path, uri: str | None = None, *overrides: str) -> tuple[Run, Config]:
    config = parse_config(config_text(folder, uri), overrides)
    return create_run(config), config


def begin(run: Run, config: Config, step: int = 0) -> tracking.Tracker:
    return tracking.start(
        run,
        config,
        step=step,
        provenance={"git": {"commit": "0123abc", "dirty": False}, "host": "somewhere"},
        dataset={"name": "tokens", "digest": "d" * 64, "tokens": 1000},
        tokenizer_file=None,
    )


def of_journal(run: Run) -> Points:
    """Returns every point of metrics.jsonl: step, milliseconds and value by key."""
    points: Points = {}
    for line in journal.read(run.metrics_file):
        for key, value in line.record.items():
            if key not in ("step", "time"):
                points.setdefault(key, []).append((line.record["step"], round(1000 * line.record["time"]), value))
    return points


def open_store(run: Run, config: Config) -> tuple[Store, str]:
    s = upload_state.load(run)
    uri, known = next((uri, of.run_id) for uri, of in s.stores.items() if of.run_id)
    return Store(uri, config.tracking.experiment, config.tracking.artifact_location), known


def read_history(store: Store, run_id: str) -> dict[str, list[Point]]:
    """Returns every point the store has of a run, by key, in the order of steps."""
    from mlflow import MlflowClient

    client = MlflowClient(store.uri)
    return {
        key: sorted(
            (Point(m.key, m.value, m.timestamp, m.step) for m in client.get_metric_history(run_id, key)),
            key=lambda p: (p.step, p.time_ms),
        )
        for key in store.read_run(run_id).data.metrics
    }


def of_mlflow(run: Run, config: Config) -> Points:
    """Returns every point of the MLflow run that comes from metrics.jsonl."""
    store, run_id = open_store(run, config)
    history = read_history(store, run_id)
    return {
        key: [(p.step, p.time_ms, p.value) for p in points]
        for key, points in history.items()
        if not key.startswith(("system/", "wall/", "usage/", "evaluation/"))
    }


def feed(tracker: tracking.Tracker, first: int, last: int, pause_s: float) -> float:
    """Logs one step every `pause_s`, as a training would; returns the seconds of the slowest call."""
    slowest = 0.0
    for step in range(first, last + 1):
        began = time.perf_counter()
        tracker.log(step, {"train/loss": 5 / step, "train/lr": 1e-3})
        slowest = max(slowest, time.perf_counter() - began)
        time.sleep(pause_s)
    return slowest


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.1)


def acknowledged(run: Run) -> int:
    """Returns the bytes of metrics.jsonl that the store has acknowledged."""
    return max((s.sent for s in upload_state.load(run).stores.values()), default=0)


class Gate:
    """A TCP relay in front of a server that can close or delay every answer."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self.delay_s = 0.0
        self.open = True
        self.accepted = 0
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._live: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def shut(self) -> None:
        """Drops open connections and refuses new ones."""
        self.open = False
        for s in list(self._live):
            s.close()

    def end(self) -> None:
        self._ended.set()
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            if not self.open:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            self._live |= {client, server}
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if answers and self.delay_s:
                    self._ended.wait(self.delay_s)
                sink.sendall(data)
        except OSError:
            return  # the gate is closed
        finally:
            for s in (source, sink):
                self._live.discard(s)
                s.close()


@contextmanager
def gate(target_port: int) -> Iterator[Gate]:
    made = Gate(target_port)
    try:
        yield made
    finally:
        made.end()


def log_steps(tracker: tracking.Tracker, first: int, last: int) -> None:
    """Logs these steps as training does, with a validation every ten steps."""
    for step in range(first, last + 1):
        tracker.log(step, {"train/loss": 5 / step, "train/lr": 1e-3, "train/tokens_seen": 64 * step})
        if step % 10 == 0:
            tracker.log(step, {"val/loss": 6 / step})


def task_evaluation(name: str, step: int, value: float, **asked: int) -> dict[str, Any]:
    """The content of a file of `evaluations/`, of one task."""
    metric = {"value": value, "stderr": value / 10, "higher_is_better": True}
    scores = {"documents": 7, "metrics": {"acc": metric}, "hash": "0", "version": "1.0", "num_fewshot": 0}
    return {
        "name": name, "step": step, "checkpoint": "c", "time": 9.0, "seconds": 1.0, "harness": "0.4.13", "limit": None,
        "num_fewshot": None, "tasks": {name: scores}, "groups": {}, **asked,
    }  # fmt: skip


def write_task_evaluation(run: Run, content: dict[str, Any]) -> None:
    """Writes the file that such a content belongs into."""
    file = evaluation_file(run, content["step"], content["name"], content["num_fewshot"], content["limit"])
    write_json(file, content)
