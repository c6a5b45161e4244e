import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from pipeline.run import journal
from pipeline.tracking import upload_state
from pipeline.tracking.energy import gpu_energy
from pipeline.tracking.helper import Helper
from pipeline.tracking.system import NodeSampler, open_monitors, read_monitors
from tests.tracking.support import make_run, wait_for


def wait_for_lines(file, count):
    end = time.monotonic() + 30
    while len(list(journal.read(file))) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_node_has_its_own_file_which_continues_after_a_restart(tmp_path):
    run, _ = make_run(tmp_path, "none")
    file = run.tracking / "system" / "node-1.jsonl"
    for count in (2, 4):
        sampler = NodeSampler(run, "node-1", interval_s=0.1)
        wait_for_lines(file, count)
        sampler.close()
    records = [line.record for line in journal.read(file)]
    assert [r["step"] for r in records] == list(range(len(records)))
    names = {k.rpartition("/")[2] for k in records[0] if k.startswith("system/node-1/")}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_usage_percentage"} <= names


@pytest.fixture
def two_gpus(monkeypatch):
    """A library that answers MLflow's own monitor like NVML for two GPUs."""
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = RuntimeError
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda i: i
    nvml.nvmlDeviceGetMemoryInfo = lambda h: types.SimpleNamespace(used=(h + 1) * 1e9, total=4e9)
    nvml.nvmlDeviceGetUtilizationRates = lambda h: types.SimpleNamespace(gpu=90 + h)
    nvml.nvmlDeviceGetPowerUsage = lambda h: 300_000
    nvml.nvmlDeviceGetEnforcedPowerLimit = lambda h: 600_000
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    from mlflow.system_metrics.metrics import gpu_monitor

    monkeypatch.setattr(gpu_monitor, "pynvml", nvml, raising=False)


def test_memory_utilisation_and_power_of_every_gpu_are_sampled(two_gpus):
    sample = read_monitors(open_monitors())
    assert sample["gpu_1_memory_usage_megabytes"] == 2000
    assert sample["gpu_1_utilization_percentage"] == 91
    assert sample["gpu_0_power_usage_watts"] == 300
    assert sample["gpu_0_power_usage_percentage"] == 50


def test_the_energy_of_a_node_s_gpus_adds_up_over_its_starts(tmp_path, two_gpus):
    run, _ = make_run(tmp_path, "none")
    file = run.system_metrics / "node-1.jsonl"
    starts = []
    for count in (4, 8):
        starts.append(len(list(journal.read(file))))
        sampler = NodeSampler(run, "node-1", interval_s=0.3)
        wait_for_lines(file, count)
        sampler.close()
    records = [line.record for line in journal.read(file)]
    joules = [r["system/node-1/gpu_energy_joules"] for r in records]
    assert joules == sorted(joules) and joules[0] == 0 < joules[2] < joules[-1]
    found = gpu_energy(run)
    assert found is not None and found[0] == joules[-1]
    assert found[0] == pytest.approx(found[1] * 300, rel=0.2), "300 W each; seconds are rounded to tenths"
    between = records[starts[1]]["time"] - records[starts[1] - 1]["time"]
    assert found[1] / 2 == pytest.approx(records[-1]["time"] - records[0]["time"] - between, abs=0.3)


@pytest.mark.parametrize(("attempt", "status"), [(1, "RUNNING"), (2, "KILLED")])
def test_a_helper_of_a_killed_training_changes_the_status_of_its_own_start_only(tmp_path, attempt, status):
    run, _ = make_run(tmp_path, "none")
    upload_state.update(
        run, lambda s: setattr(s, "attempt", 2)
    )  # the next start, while the helper's imports took seconds
    helper = Helper(run, None, attempt)
    helper._process.stdin.close()
    assert helper._process.wait(60) == 0
    assert upload_state.load(run).status == status


def test_the_helper_gives_training_priority_on_the_processor(tmp_path):
    run, _ = make_run(tmp_path, "none")
    helper = Helper(run, None, 1)
    process = psutil.Process(helper._process.pid)
    behind = min(psutil.Process().nice() + 10, 19)
    by_session = Path(f"/proc/{process.pid}/autogroup")  # on kernels that share the processor between sessions
    try:
        wait_for(lambda: process.nice() == behind, 30)
        wait_for(lambda: not by_session.exists() or by_session.read_text().endswith("nice 10\n"), 30)
    finally:
        assert helper.close(30)
