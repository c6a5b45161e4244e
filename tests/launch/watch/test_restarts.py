"""While a node is lost, `pipeline status` says what is known: which node, and when the job starts again."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from pipeline.run import attempts, journal
from pipeline.run.attempts import AttemptBegan
from pipeline.run.events import NodeLost, StartBegan, append
from pipeline.run.folder import Run
from tests.launch.support import FakeSlurm
from tests.launch.watch.test_status import run as run
from tests.launch.watch.test_status import status


def test_a_training_whose_node_was_lost_says_so_and_when_it_starts_again(
    run: Run, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
):
    attempts.note(run, AttemptBegan(stage="train", job="102", attempt=0, nodes="n[1-2]"))
    append(run.events_file, StartBegan(time=time.time() - 60, number=1))
    slurm.says("squeue", "102|RUNNING|None|n[1-2]||tiny-train\n")
    slurm.says("scontrol", "n1\nn2\n")
    slurm.says("sinfo", "n1|allocated|gpu|f\nn2|down*|gpu|f\n")
    journal.append(run.metrics_file, {"step": 1, "time": time.time() - 41, "time/step_s": 1.0})
    journal.append(run.metrics_file, {"step": 2, "time": time.time() - 40, "time/step_s": 1.0})
    monkeypatch.setattr("pipeline.launch.watch.restarts.longest_silence_s", lambda run, events: 60.0)
    assert status().reason == ""
    monkeypatch.setattr("pipeline.launch.watch.restarts.longest_silence_s", lambda run, events: 30.0)
    found = status()
    assert (found.state, found.reason) == ("running", "n2 does not answer")

    noon = datetime(2026, 1, 2, 12, 40).timestamp()
    monkeypatch.setattr("pipeline.launch.slurm.client.start_time", lambda job: noon)
    slurm.says("squeue", "102|PENDING|BeginTime|||tiny-train\n")
    found = status()
    assert (found.state, found.reason) == ("queued", "n2 was lost; starts again at 12:40")
    slurm.says("squeue", "102|PENDING|Resources|||tiny-train\n")
    assert status().reason == "n2 was lost; waits for Resources, expected to start at 12:40"
    monkeypatch.setattr("pipeline.launch.slurm.client.start_time", lambda job: None)
    slurm.says("squeue", "102|PENDING|BeginTime|||tiny-train\n")
    assert status().reason == "n2 was lost; starts again soon"

    append(run.events_file, NodeLost(job="102", nodes=["n2"]))
    attempts.note(run, AttemptBegan(stage="train", job="102", attempt=1, nodes="n[1,3]"))
    slurm.says("squeue", "102|RUNNING|None|n[1,3]||tiny-train\n")
    assert status().reason == "starts again: n2 was lost"
    append(run.events_file, StartBegan(number=2, restart=1))
    assert status().reason == ""
