"""Profiles and the time of a rank on a real GPU."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import pytest
import torch

from pipeline.train.profile.recorder import Recorder
from pipeline.train.ranks.activity import Activity

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)


def test_a_trace_holds_kernels_and_the_snapshot_the_allocations(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, DEVICE)
    recorder.start()
    recorder.begin_step(4)
    held = torch.ones(1 << 20, device=DEVICE) * 2
    torch.cuda.synchronize()
    trace, memory = recorder.stop()()
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any(e.get("cat") == "kernel" for e in events) and any(e.get("name") == "step 5" for e in events)
    traced = [entry for device in pickle.loads(memory.read_bytes())["device_traces"] for entry in device]
    assert any(entry["size"] >= held.nbytes for entry in traced)


def test_the_time_before_a_collective_is_the_devices(tmp_path: Path) -> None:
    """The host has launched the work long before the device has done it."""
    matrix = torch.rand(8192, 8192, device=DEVICE)
    activity = Activity(DEVICE)
    (matrix @ matrix).sum().item()
    activity.begin_step(0)
    for _ in range(20):
        matrix = matrix @ matrix
    activity.begin_collective()
    assert activity.now().own_s is None, "no rank waits for its device to say what it does"
    torch.cuda.synchronize()
    own = activity.now().own_s
    assert own is not None and own > 0.01
