"""Measures what logging costs training: steps with and without it, with MLflow well, slow, stopped or absent.

    python -m benchmarks.tracking [CONDITION ...]

One process trains one model with one thread and switches logging on and off every step or two (off, on, on, off). Both
halves then share the same memory, the same weights and whatever else the machine does: a disturbance on a shared
machine lasts longer than a step. Off, no line is written and the helper process, which feeds MLflow, is stopped. On, a
line of eleven metrics is written for every step, ten times as often as by default, and the helper does the work of both
halves, because its rounds follow the clock. The server is a real `mlflow server` on this machine; SIGSTOP stops it for
the condition of that name. The slow one is behind a relay that delays every answer.

The figure is the Hodges-Lehmann mean of the ratios of neighbouring steps (the median of the means of any two), with its
95% interval from Wilcoxon's signed ranks. `control` is the same with nothing to switch: what the method cannot see.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import save
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.upload.sync import sync
from pipeline.tracking.upload.ui import local_server
from tests.processes import free_port
from tests.tracking.support import gate, make_run, of_journal, of_mlflow

SECONDS = {  # of one pass
    "control": 60,
    "sqlite": 70,
    "server": 70,
    "server stopped for a minute": 100,
    "server answers after 30 s": 75,
    "no server": 70,
}
PASSES = 2  # over all conditions, in turn
STOPPED = (20.0, 80.0)
WARM_UP_S = (10.0, 40.0)  # until the store has its first points, if it is there


class Switched:
    """A tracker that can be switched off together with its helper process."""

    def __init__(self, folder: Path, uri: str) -> None:
        from pipeline import tracking

        run, config = make_run(folder, uri)
        about = {"digest": "0" * 64}
        self._run = run
        self._tracker = tracking.start(run, config, step=0, provenance={}, dataset=about, tokenizer_file=None)
        self._helpers = psutil.Process().children(recursive=True)
        self._step = 0
        self.calls: list[float] = []

    def switch(self, on: bool) -> None:
        """Resumes or stops the helper."""
        for helper in self._helpers:
            helper.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def log(self, loss: float, base: float) -> None:
        """Logs the next step and notes how long the call took."""
        began = time.perf_counter()
        self._step += 1
        self._tracker.log(self._step, {"train/loss": loss, **{f"train/metric_{i}": i + base for i in range(10)}})
        self.calls.append(time.perf_counter() - began)

    def has_sent(self) -> bool:
        """Says whether the store has acknowledged points."""
        return self._run.mlflow_file.exists() and any(s.sent for s in upload_state.load(self._run).stores.values())

    def end(self) -> dict[str, float]:
        """Closes the tracker; returns the helper's CPU seconds and the seconds that closing took."""
        self.switch(True)
        helper_s = sum(sum(helper.cpu_times()[:2]) for helper in self._helpers)
        began = time.perf_counter()
        self._tracker.close("STOPPED")
        return {"helper_s": helper_s, "close_s": time.perf_counter() - began}


def child(folder: Path, uri: str, seconds: float) -> None:
    """Trains, switching logging between steps, and records the time of every step."""
    import torch

    from pipeline.model.loss import cross_entropy
    from pipeline.model.transformer import TransformerLM
    from pipeline.optim.adamw import AdamW

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TransformerLM(512, 64, 128, 2, 4, 341, 10000.0)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    x = torch.randint(512, (8, 65))
    tracker = Switched(folder, uri) if uri else None

    def step(on: bool) -> tuple[float, float]:
        began, began_cpu = time.perf_counter(), time.thread_time()
        loss = cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()
        if on and tracker is not None:
            tracker.log(value, began)
        return time.perf_counter() - began, time.thread_time() - began_cpu

    # Importing mlflow and creating the tables of a new store happen once per run: they are not a cost of a step.
    began = time.monotonic()
    while (passed := time.monotonic() - began) < WARM_UP_S[1]:
        step(True)
        if passed > WARM_UP_S[0] and (tracker is None or tracker.has_sent()):
            break
    began = time.monotonic()
    steps: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    while time.monotonic() - began < seconds:
        for on in (False, True, True, False):
            if tracker is not None:
                tracker.switch(on)
            steps[on].append(step(on))
    result = {"off": steps[False], "on": steps[True]}
    if tracker is not None:
        result |= {"calls": tracker.calls, **tracker.end()}
    (folder / "result.json").write_text(json.dumps(result))


def train(folder: Path, uri: str, seconds: float, at: Callable[[float], None] = lambda _: None) -> dict[str, Any]:
    """Runs the training in a separate process, calling `at` with the seconds that have passed."""
    command = [sys.executable, "-m", "benchmarks.tracking", "child", str(folder), uri, str(seconds)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    began = time.monotonic()
    try:
        while process.poll() is None:
            at(time.monotonic() - began)
            time.sleep(0.2)
    finally:
        process.kill()
    if process.returncode != 0:
        raise SystemExit(f"the training ended with status {process.returncode}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def ratio(passes: list[Any], clock: int) -> dict[str, Any]:
    """Returns the ratio on/off of neighbouring steps by one of the two clocks, with a 95% interval."""
    off, on = (np.concatenate([np.array(found[name])[:, clock] for found in passes]) for name in ("off", "on"))
    ratios = np.log(on / off)
    first, second = np.triu_indices(len(ratios))
    means = np.sort((ratios[first] + ratios[second]) / 2)
    n = len(ratios)
    reach = 1.96 * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    low, middle, high = (float(np.exp(means[round(len(means) / 2 + at)])) for at in (-reach, 0, reach))
    return {"on_over_off": round(middle, 4), "interval_95": [round(low, 4), round(high, 4)], "pairs": n}


def summary(passes: list[Any]) -> dict[str, Any]:
    medians = {n: statistics.median(wall for found in passes for wall, _ in found[n]) for n in ("off", "on")}
    figures: dict[str, Any] = {
        "median_step_ms": {name: round(1000 * s, 3) for name, s in medians.items()},
        "step_time": ratio(passes, 0),
        "cpu_time_of_the_training_thread": ratio(passes, 1),
    }
    if "calls" in passes[0]:
        calls = sorted(call for found in passes for call in found["calls"])
        figures |= {
            "log_call_us": {
                "median": round(1e6 * statistics.median(calls)),
                "p99": round(1e6 * calls[-len(calls) // 100]),
            },
            "log_call_over_step": round(statistics.median(calls) / medians["off"], 4),
            "helper_cpu_s_of_each_pass": [round(found["helper_s"], 1) for found in passes],
            "close_s": [round(found["close_s"], 2) for found in passes],
            "sent_before_sync": [found["sent_before_sync"] for found in passes],
            "mlflow_equals_metrics_jsonl_after_sync": all(found["equal"] for found in passes),
        }
    return figures


@contextlib.contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[Callable[[float], None]]:
    """Stops the server and all its processes between the two times of `STOPPED`."""
    still = False

    def at(elapsed: float) -> None:
        nonlocal still
        if (STOPPED[0] <= elapsed < STOPPED[1]) != still:
            still = not still
            os.killpg(process.pid, signal.SIGSTOP if still else signal.SIGCONT)

    try:
        yield at
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def measure(condition: str) -> dict[str, Any]:
    """Runs one pass of a condition."""
    seconds = SECONDS[condition]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = f"sqlite:///{folder}/mlflow.db"
        if condition == "control":
            return train(folder, "", seconds)
        if condition == "sqlite":
            return train(folder, store, seconds) | complete(folder)
        if condition == "no server":
            port = free_port()
            found = train(folder, f"http://127.0.0.1:{port}", seconds)
            with local_server(store, port):
                return found | complete(folder)
        with local_server(store, free_port()) as server:
            if condition == "server":
                return train(folder, server.url, seconds) | complete(folder)
            if condition == "server stopped for a minute":
                with stopped(server.process) as at:
                    found = train(folder, server.url, seconds, at)
                return found | complete(folder)
            with gate(int(server.url.rpartition(":")[2])) as door:
                door.delay_s = 30.0
                found = train(folder, door.url, seconds)
                door.delay_s = 0.0
                return found | complete(folder)


def complete(folder: Path) -> dict[str, Any]:
    """Returns what training itself had sent, and whether MLflow equals metrics.jsonl after `pipeline sync`."""
    run = Run(folder / "runs" / "try")
    sent = max((s.sent for s in upload_state.load(run).stores.values()), default=0)
    share = sent / run.metrics_file.stat().st_size
    sync(run)
    equal = of_mlflow(run, run.config()) == of_journal(run)
    return {"sent_before_sync": round(share, 4), "equal": equal}


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "child":
        child(Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("conditions", nargs="*", metavar="CONDITION", help=f"{', '.join(SECONDS)}; by default all")
    conditions = parser.parse_args().conditions or list(SECONDS)
    if unknown := set(conditions) - set(SECONDS):
        parser.error(f"no such condition: {', '.join(sorted(unknown))}")
    passes: dict[str, list[Any]] = {condition: [] for condition in conditions}
    for _ in range(PASSES):
        for condition, found in passes.items():
            found.append(measure(condition))
            print(condition, json.dumps(summary(found)), flush=True)
    save("tracking", {condition: summary(found) for condition, found in passes.items()})


if __name__ == "__main__":
    main()
