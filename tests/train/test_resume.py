"""A run that is stopped and resumed equals the run that was not stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint.layout import published
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.weights import load_weights
from pipeline.config.load import load_config
from pipeline.run.folder import step_name
from tests import processes
from tests.experiment import STEPS, curve, events, in_precision, validations
from tests.train.conftest import Lab
from tests.train.engine.reference import learning_rate, new_model, plain_optimizer, train_plainly
from tests.train.engine.test_numerics import TOLERANCE, losses

HALF = 50  # the uninterrupted runs have a checkpoint there
# Every stage at two ranks, and the ends of the range; the fault harness draws from all twelve layouts.
STOPPED = [
    *((*layout, "fp32") for layout in ((1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 3))),
    *((*layout, "bf16") for layout in ((1, 0), (1, 1), (2, 2), (2, 3), (4, 3))),
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def same_weights(run: Path, other: Path, step: int) -> bool:
    ours, theirs = (load_weights(r / "checkpoints" / step_name(step)) for r in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(("number", "layout"), list(enumerate(STOPPED)))
def test_stopped_and_resumed_on_the_same_layout_every_bit_is_the_same(
    lab: Lab, number: int, layout: tuple[int, int, str]
) -> None:
    """Each layout is stopped at another step; the claim includes that it computes the same bits twice."""
    world, stage, precision = layout
    name, stopped_at = f"resumed_{world}_{stage}_{precision}", 2 + 3 * number
    settings = in_precision(precision, world, stage)
    lab.train(name, world, stage, f"train.max_iters={stopped_at}", **settings)
    run = lab.train(name, world, stage, f"train.max_iters={HALF}", **settings)
    assert [e["step"] for e in events(run, "resumed")] == [stopped_at]
    whole = lab.uninterrupted(*layout)
    assert curve(run) == curve(whole)[:HALF]
    assert {v for v in validations(whole) if v[0] <= HALF} <= set(validations(run))
    assert same_weights(run, whole, HALF)


def test_other_numbers_of_ranks_and_stages_continue_along_one_curve(lab: Lab) -> None:
    """Four ranks at ZeRO-3, then one at ZeRO-0, then two at ZeRO-1, then four at ZeRO-2."""
    for world, stage, until in ((4, 3, 30), (1, 0, 55), (2, 1, 80), (4, 2, STEPS)):
        run = lab.train("moved", world, stage, f"train.max_iters={until}")
    assert [e["world_size"] for e in events(run, "resumed")] == [1, 2, 4]
    assert [step for step, _ in curve(run)] == list(range(1, STEPS + 1)), "each step once"
    assert losses(run) == pytest.approx(losses(lab.uninterrupted(1, 0)), rel=TOLERANCE)


def test_weights_that_every_layer_fetches_are_resumed_bit_for_bit_too(lab: Lab) -> None:
    """At stage 3 DeepSpeed keeps small parameters whole on all ranks; here that would be all of them."""
    settings = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    lab.train("fetched", 2, 3, "train.max_iters=37", **settings)
    run = lab.train("fetched", 2, 3, f"train.max_iters={HALF}", **settings)
    assert [e["step"] for e in events(run, "resumed")] == [37]
    assert curve(run) == curve(lab.uninterrupted(2, 3))[:HALF]
    assert same_weights(run, lab.uninterrupted(2, 3), HALF)
    recorded = (run / "events.jsonl").read_text()
    lab.train("fetched", 2, 3, f"train.max_iters={HALF}", **settings)
    assert (run / "events.jsonl").read_text() == recorded, "all ranks of a finished run end at once, with status 0"


def test_plain_pytorch_resumes_from_a_checkpoint_of_four_ranks_at_zero_3(lab: Lab) -> None:
    """A single process without DeepSpeed reads weights and moments of all ranks."""
    run, config_file = lab.uninterrupted(4, 3), lab.config("plain")
    reader, config = CheckpointReader(run / "checkpoints" / step_name(50)), load_config(config_file)
    model = new_model(config)
    optimizer = plain_optimizer(model, config.optimizer)
    for name, parameter in model.named_parameters():
        parameter.data = reader.read_whole("weight", name)
        moments = {key: reader.read_whole(key, name) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(50.0), **moments}
    assert learning_rate(50, config.optimizer) > 0
    found = train_plainly(config_file, range(50, STEPS), model, optimizer)
    assert found.losses == pytest.approx(losses(run)[50:], rel=TOLERANCE)


def test_a_swapped_dataset_is_refused(lab: Lab, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    shutil.copytree(Path(load_config(lab.config("data")).data.path), tokens)
    run = lab.train("swapped", 1, 0, **{"train.max_iters": 2, "data.path": str(tokens)})
    before = [f.name for f in published(run / "checkpoints")]

    sources = [{"name": s, "paths": [str(tmp_path / f"{s}.txt")], "split": s} for s in ("train", "validation")]
    for source in sources:
        Path(source["paths"][0]).write_text("A different text of peace and war and of the law of the people. " * 400)
    other = lab.config("swapped", **{"data.path": str(tokens), "data.sources": sources})
    shutil.rmtree(tokens)
    processes.run(["prepare", str(other)], 1, tmp_path / "prepare.log")
    ranks = processes.start(["train", str(other)], 1, tmp_path / "train.log")
    assert ranks.wait(60) and ranks.codes == {0: 1}
    assert "trained on the dataset" in ranks.words() and "Traceback" not in ranks.words()
    assert [f.name for f in published(run / "checkpoints")] == before
