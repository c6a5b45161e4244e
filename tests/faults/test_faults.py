"""Training survives fifty faults at random moments, judged against undisturbed runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import processes
from tests.faults.strikes import STRIKES
from tests.processes import Ranks

FAULTS = {"fp32": 50, "bf16": 20}  # benchmarks/results/faults_bf16.json holds 50 of these too
TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3}
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", FAULTS)
def test_faults_cost_only_the_steps_since_the_last_durable_checkpoint(tmp_path: Path, precision: str) -> None:
    report = tmp_path / "faults.json"
    options = ["--faults", str(FAULTS[precision]), "--seed", "1", "--precision", precision, "--out", str(report)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.harness", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-8000:]
    result = json.loads(report.read_text())
    assert result["faults"] >= FAULTS[precision]
    assert result["kinds"].keys() == STRIKES.keys()
    assert result["worst_relative_difference"] <= TOLERANCE[precision]


class Clock:
    """Moves on when the code under test sleeps."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("share_of_time_queued", "given_up_after"), [(0.0, 30), (0.5, 60), (1.0, 120)])
def test_waiting_for_a_processor_is_no_hang_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, share_of_time_queued: float, given_up_after: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(processes, "time", clock)
    monkeypatch.setattr(Ranks, "_queued_s", lambda self: clock.now * share_of_time_queued)
    assert not Ranks([], Path("log")).within(lambda: False, 30)
    assert clock.now == pytest.approx(given_up_after, abs=0.1)
