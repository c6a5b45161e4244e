"""The model of a checkpoint is put where the config says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pipeline.commands.sample
from pipeline.run.folder import open_run
from pipeline.train.evaluate import evaluate_run
from tests.train.conftest import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_device_cpu_keeps_samples_and_evaluation_off_the_gpu(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(lab.train("sampled", 1, 0, "train.max_iters=2"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices: list[str] = []
    generate = pipeline.commands.sample.generate

    def noted(model: Any, *args: Any) -> list[int]:
        devices.append(model.device.type)
        return generate(model, *args)

    monkeypatch.setattr(pipeline.commands.sample, "generate", noted)
    assert len(pipeline.commands.sample.sample_run(run, "the")) == 1
    assert devices == ["cpu"]
    assert evaluate_run(run).step == 2
