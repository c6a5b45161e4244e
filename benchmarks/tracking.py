"""What tracking costs a training step: logging off against logging on, with MLflow well, slow, away and absent.

    python -m benchmarks.tracking [CONDITION ...]

Two processes train the same model with one thread each, one of them with logging off. They take turns of a
second (each stops itself at a step's end, and the one that logs takes its helper process with it), so that
whatever else the machine does meets both alike. Every step logs a line of eleven metrics, ten times what the
default asks for. The server is a real `mlflow server` behind a relay that can be shut, or hold answers back.

Of each pair of turns the ratio of the median step times is taken; the figure is the median of the ratios, with
the interval that holds the true median with 95% probability (by order statistics).
"""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import save
from pipeline.run import Run
from pipeline.tracking import state
from pipeline.tracking.sync import sync
from pipeline.tracking.ui import local_server
from tests.tracking.support import gate, make_run, of_journal, of_mlflow, unused_port

TURN_S = 1.0
SECONDS = {
    "sqlite": 120,
    "server": 120,
    "server away for a minute": 180,
    "server answers after 30 s": 180,
    "no server": 120,
}
AWAY = (40.0, 100.0)


def child(folder: Path, uri: str, enabled: bool) -> None:
    """Trains until told to end; stops itself after every turn."""
    import torch

    from pipeline import tracking
    from pipeline.model.loss import cross_entropy
    from pipeline.model.transformer import TransformerLM
    from pipeline.optim.adamw import AdamW

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = TransformerLM(512, 64, 128, 2, 4, 341, 10000.0)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    x = torch.randint(512, (8, 65))
    run, config = make_run(folder, uri)
    tracker = tracking.Tracker()
    if enabled:
        about = {"digest": "0" * 64}
        tracker = tracking.start(run, config, step=0, provenance={}, dataset=about, tokenizer_file=None)
    turns: list[list[float]] = []
    cpu: list[list[float]] = []
    calls: list[float] = []
    step = 0
    while not (folder / "end").exists():
        turns.append([])
        cpu.append([])
        until = time.perf_counter() + TURN_S
        while time.perf_counter() < until:
            began, began_cpu = time.perf_counter(), time.thread_time()
            loss = cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            metrics = {f"train/metric_{i}": i + began for i in range(10)}
            value = loss.item()
            logging = time.perf_counter()
            step += 1
            if enabled:
                tracker.log(step, {"train/loss": value, **metrics})
            ended = time.perf_counter()
            turns[-1].append(ended - began)
            cpu[-1].append(time.thread_time() - began_cpu)
            calls.append(ended - logging)
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.perf_counter()
    tracker.close("STOPPED")
    # The first turn warms up.
    result = {"turns": turns[1:], "cpu": cpu[1:], "calls": calls, "close_s": time.perf_counter() - began}
    (folder / "result.json").write_text(json.dumps(result))


def start_child(folder: Path, uri: str, enabled: bool) -> subprocess.Popen[bytes]:
    folder.mkdir()
    command = [sys.executable, "-m", "benchmarks.tracking", "child", str(folder), uri, str(int(enabled))]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def turn(process: subprocess.Popen[bytes]) -> float:
    """Lets a process train, with its helper, until it stops itself; returns CPU seconds of the helper so far."""
    helpers = psutil.Process(process.pid).children(recursive=True)
    for helper in helpers:
        helper.resume()
    os.kill(process.pid, signal.SIGCONT)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        raise SystemExit(f"a training ended with status {status}")
    for helper in helpers:
        helper.suspend()
    return sum(sum(helper.cpu_times()[:2]) for helper in helpers)


def take_turns(folder: Path, uri: str, seconds: float, at: Callable[[float], None]) -> tuple[Any, Any]:
    """Trains with logging off and on by turns; returns what both measured."""
    processes = {name: start_child(folder / name, uri, name == "on") for name in ("off", "on")}
    try:
        for process in processes.values():
            os.waitpid(process.pid, os.WUNTRACED)
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            at(time.monotonic() - began)
            helper_s = [turn(process) for process in processes.values()]
        for name, process in processes.items():
            (folder / name / "end").touch()
            for paused in psutil.Process(process.pid).children(recursive=True):
                paused.resume()
            os.kill(process.pid, signal.SIGCONT)
            os.waitpid(process.pid, 0)
    finally:
        for process in processes.values():
            process.kill()
    off, on = (json.loads((folder / name / "result.json").read_text()) for name in ("off", "on"))
    return off, {**on, "helper_s": helper_s[1]}


def paired(off: list[list[float]], on: list[list[float]]) -> dict[str, Any]:
    """Median over pairs of turns of the ratio of their median steps, with a 95% interval of that median."""
    pairs = zip(off, on, strict=False)
    ratios = sorted(statistics.median(b) / statistics.median(a) for a, b in pairs if a and b)
    # The ranks between which the median lies: a binomial distribution, by its normal approximation.
    reach = 0.98 * math.sqrt(len(ratios))
    low, high = math.floor(len(ratios) / 2 - reach), math.ceil(len(ratios) / 2 + reach)
    interval = [round(ratios[max(0, low)], 4), round(ratios[min(len(ratios) - 1, high)], 4)]
    return {"on_over_off": round(statistics.median(ratios), 4), "interval_95": interval, "pairs": len(ratios)}


def summary(off: Any, on: Any) -> dict[str, Any]:
    steps = [[s for turn in r["turns"] for s in turn] for r in (off, on)]
    medians = [1000 * statistics.median(s) for s in steps]
    calls = sorted(on["calls"])
    return {
        "steps": {"off": len(steps[0]), "on": len(steps[1])},
        "median_step_ms": {"off": round(medians[0], 3), "on": round(medians[1], 3)},
        "step_time": paired(off["turns"], on["turns"]),
        "cpu_time_of_the_training_thread": paired(off["cpu"], on["cpu"]),
        "helper_cpu_s": round(on["helper_s"], 1),
        "log_call_us": {"median": round(1e6 * statistics.median(calls)), "p99": round(1e6 * calls[-len(calls) // 100])},
        "close_s": round(on["close_s"], 2),
    }


def measure(condition: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if condition == "sqlite":
            found = take_turns(folder, f"sqlite:///{folder}/mlflow.db", SECONDS[condition], lambda _: None)
            return {**summary(*found), **complete(folder)}
        if condition == "no server":
            port = unused_port()
            found = take_turns(folder, f"http://127.0.0.1:{port}", SECONDS[condition], lambda _: None)
            with local_server(f"sqlite:///{folder}/server.db", port=port):
                return {**summary(*found), **complete(folder)}
        with local_server(f"sqlite:///{folder}/server.db") as server, gate(int(server.url.rpartition(":")[2])) as door:
            door.delay_s = 30.0 if condition == "server answers after 30 s" else 0.0

            def at(elapsed: float) -> None:
                away = condition == "server away for a minute" and AWAY[0] <= elapsed < AWAY[1]
                if away and door.open:
                    door.shut()
                door.open = not away

            found = take_turns(folder, door.url, SECONDS[condition], at)
            door.delay_s, door.open = 0.0, True
            return {**summary(*found), **complete(folder)}


def complete(folder: Path) -> dict[str, Any]:
    """What training had got through by itself, and whether MLflow equals metrics.jsonl after `pipeline sync`."""
    run = Run(folder / "on" / "runs" / "try")
    sent = max((s.sent for s in state.load(run).stores.values()), default=0)
    share = sent / run.metrics_file.stat().st_size
    sync(run)
    equal = of_mlflow(run, run.config()) == of_journal(run)
    return {"sent_before_sync": round(share, 4), "mlflow_equals_metrics_jsonl_after_sync": equal}


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "child":
        child(Path(sys.argv[2]), sys.argv[3], sys.argv[4] == "1")
        return
    figures = {}
    for condition in sys.argv[1:] or SECONDS:
        figures[condition] = measure(condition)
        print(condition, json.dumps(figures[condition]), flush=True)
    save("tracking", figures, "other programs shared the two cores; turns of a second meet them alike")


if __name__ == "__main__":
    main()
