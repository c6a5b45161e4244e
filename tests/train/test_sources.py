"""A run on several sources: phases, tokens seen, and a validation loss of each, one of them validation-only."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional

import pipeline.train.loop as loop
from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.data.build.display import prepare_here
from pipeline.data.dataset import TokenDataset, open_dataset
from pipeline.run.folder import Run, run_for
from pipeline.train.evaluate import evaluate_run
from pipeline.train.model import load_model
from tests.experiment import curve, lines
from tests.test_bad_input import experiment

PHASES = [{"from_step": 0, "weights": {"web": 3.0, "code": 1.0}}, {"from_step": 8, "weights": {"code": 1.0}}]
LATER = [PHASES[0], {"from_step": 7, "weights": {"web": 1.0}}]


def config_of(folder: Path, name: str, steps: int, phases: list[dict[str, Any]]) -> Config:
    overrides = [f"data.phases={json.dumps(phases)}", f"name={name}", f"train.max_iters={steps}"]
    return load_config(folder / "config.yaml", overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources divided by a hash of each document, and one that is only for validation."""
    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(3)
    sources = []
    for name, count, split in (("web", 500, "auto"), ("code", 200, "auto"), ("held", 12, "validation")):
        texts = ["".join(rng.choices("etaoin shrdlu", k=rng.randint(10, 80))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("|".join(texts))
        sources.append({"name": name, "paths": [str(folder / f"{name}.txt")], "split": split, "separator": "|"})
    experiment(
        folder,
        **{"data.sources": sources, "data.validation_fraction": 0.1, "train.log_interval": 1, "train.val_interval": 4,
           "train.num_val_batches": 1000, "train.checkpoint_interval": 5, "train.batch_size": 8,
           "train.micro_batch_size": 4},
    )  # fmt: skip
    prepare_here(config_of(folder, "data", 10, PHASES), None)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Run:
    """Ten steps without a stop."""
    config = config_of(folder, "whole", 10, PHASES)
    loop.train(config)
    return run_for(config)


def test_a_run_whose_future_phase_changes_resumes_bitwise_up_to_it(folder: Path, whole: Run) -> None:
    loop.train(config_of(folder, "changed", 5, PHASES))
    config = config_of(folder, "changed", 10, LATER)
    loop.train(config)
    run = run_for(config)
    assert curve(run.path)[:7] == curve(whole.path)[:7]
    assert all(ours != theirs for ours, theirs in zip(curve(run.path)[7:], curve(whole.path)[7:], strict=True))
    assert [start["phases"] for start in run.provenance()] == [PHASES, LATER]
    assert yaml.safe_load(run.config_text())["data"]["phases"] == LATER


def test_tokens_seen_follow_the_phases_and_add_up(folder: Path, whole: Run) -> None:
    found = [line for line in lines(whole.metrics_file) if "train/loss" in line]
    by_source = [(line["data/web/tokens_seen"], line["data/code/tokens_seen"]) for line in found]
    assert [sum(pair) for pair in by_source] == [line["train/tokens_seen"] for line in found]
    assert by_source[7][0] == by_source[9][0] > by_source[7][1], "web is absent from step 8 on"
    stopped = config_of(folder, "stopped", 5, PHASES)
    loop.train(stopped)
    resumed = config_of(folder, "stopped", 10, PHASES)
    loop.train(resumed)
    last = lines(run_for(resumed).metrics_file)[-2]
    assert (last["data/web/tokens_seen"], last["data/code/tokens_seen"]) == by_source[9]


def plain_loss(logits_of: Any, dataset: TokenDataset, source: str, context: int) -> float:
    """The loss on all windows of a source, read at once."""
    read = dataset.source_streams()[source]
    count = (read.tokens - 1) // context
    tokens = torch.from_numpy(read.gather(torch.tensor([0]).numpy(), count * context + 1)[0].astype("int64"))
    with torch.no_grad():
        logits = logits_of(tokens[:-1].view(count, context))
    return float(functional.cross_entropy(logits.flatten(0, 1).double(), tokens[1:]))


def test_the_losses_of_the_sources_are_a_plain_loops_and_add_up_to_the_whole(folder: Path, whole: Run) -> None:
    config = whole.config()
    model = load_model(config, whole.checkpoints / "step_00000010")
    dataset = open_dataset(config.data.path, "validation")
    streams = dataset.source_streams()
    assert list(streams) == ["web", "code", "held"]
    recorded = next(line for line in lines(whole.metrics_file) if line["step"] == 10 and "val/loss" in line)
    for name, stream in streams.items():
        loss = plain_loss(model, dataset, name, config.model.context_length)
        assert recorded[f"val/{name}/loss"] == pytest.approx(loss, rel=1e-6)
        bits = loss / math.log(2) * stream.tokens / stream.bytes
        assert recorded[f"val/{name}/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    weighted = sum(s.tokens * recorded[f"val/{name}/loss"] for name, s in streams.items()) / len(dataset)
    assert recorded["val/loss"] == pytest.approx(weighted, rel=1e-12)
    bits = sum(s.bytes * recorded[f"val/{name}/bits_per_byte"] for name, s in streams.items()) / dataset.bytes
    assert recorded["val/bits_per_byte"] == pytest.approx(bits, rel=1e-12)
    evaluation = evaluate_run(whole)
    assert evaluation.metrics() == {key: recorded[key] for key in evaluation.metrics()}
    saved = whole.evaluation()
    assert saved is not None and saved["sources"].keys() == streams.keys()
