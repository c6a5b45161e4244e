"""The acceptance kit for GPUs runs on a CPU too, so that it still works on the next GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_kit_passes_on_a_cpu_and_writes_what_it_found(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {check["passed"] for check in found["checks"]} == {True} and not found["errors"]
    names = " ".join(check["name"] for check in found["checks"])
    for kind in ("losses, bf16, stage 3", "host memory", "save", "resume", "compiled"):
        assert kind in names
    own, llama = found["speeds"]
    assert own["way"].startswith("own") and own["tokens_per_s"] > 0 and own["planned_gib"] > 0
    assert "Llama" in llama["way"]


@pytest.mark.slow
def test_without_a_gpu_the_kit_says_how_to_run_it_on_a_cpu(tmp_path: Path) -> None:
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 2 and "--device cpu --tiny" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "gpu.json").exists()
