"""A run branches from another one: with its curve where nothing changed, and with the formula where something did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest, published
from pipeline.checkpoint.weights import load_weights
from pipeline.commands.average import average_run
from pipeline.data.build.display import prepare_here
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import run_for
from tests.experiment import curve, events, validations
from tests.train.engine.reference import train_plainly
from tests.train.origin.lineage import AT, Lineage, checkpoint, plain_state, written


def test_with_nothing_changed_the_curve_is_the_parents_bit_for_bit(line: Lineage) -> None:
    before = line.digests()
    config = line.branch()
    result = loop.train(config)
    run = run_for(config)
    assert curve(run.path) == curve(line.run.path)[AT:]
    assert set(validations(run.path)) == {v for v in validations(line.run.path) if v[0] > AT}
    ours, theirs = (load_weights(checkpoint(r, 10)) for r in (run, line.run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    states = [Manifest.load(checkpoint(r, 10)).state for r in (run, line.run)]
    for key in ("tokens_seen", "optimizer_steps", "guard", "rng"):
        assert states[0][key] == states[1][key], key
    assert result.tokens_seen == states[1]["tokens_seen"]
    assert line.digests() == before


def test_where_it_comes_from_is_recorded_and_a_saved_branch_needs_its_parent_no_more(line: Lineage) -> None:
    config = line.branch(**{"train.max_iters": 8, "optimizer.weight_decay": 0.3})
    loop.train(config)
    run, (parent, digest) = run_for(config), Manifest.load_named(checkpoint(line.run, AT))
    record = run.origin()
    assert record is not None
    assert record["from"] == str(checkpoint(line.run, AT).resolve())
    assert (record["step"], record["digest"], record["what"]) == (AT, digest, "all")
    assert [d.partition(":")[0] for d in record["differences"]] == ["optimizer.weight_decay", "train.max_iters"]
    assert Manifest.load(checkpoint(run, 8)).state["init"] == record

    below = line.branch("below", run.path, **{"init.step": "newest"})
    shutil.rmtree(line.run.path)
    loop.train(below)
    origin = run_for(below).origin()
    assert origin is not None and origin["step"] == 8
    assert [a["digest"] for a in origin["ancestors"]] == [digest]
    assert parent.step == AT


def test_weights_alone_begin_at_step_zero_with_fresh_moments(line: Lineage) -> None:
    config = line.branch(**{"init.what": "weights", "train.max_iters": 4})
    loop.train(config)
    model = TransformerLM(**config.model.model_dump())
    model.load_state_dict(load_weights(checkpoint(line.run, AT)))
    plain = train_plainly(written(config, line.folder), range(4), model)
    assert [step for step, _ in curve(run_for(config).path)] == [1, 2, 3, 4]
    assert [loss for _, loss in curve(run_for(config).path)] == pytest.approx(plain.losses, rel=1e-5)
    assert Manifest.load(checkpoint(run_for(config), 4)).state["optimizer_steps"] == 4


def test_a_run_starts_from_the_average_of_another_ones_checkpoints(line: Lineage) -> None:
    mean = line.folder / "mean"
    average_run(line.run, 2, "uniform", mean)
    config = line.branch("averaged", mean, **{"init.step": "newest", "init.what": "weights", "train.max_iters": 1})
    loop.train(config)
    model = TransformerLM(**config.model.model_dump())
    model.load_state_dict(load_weights(published(mean / "checkpoints")[-1]))
    plain = train_plainly(written(config, line.folder), range(1), model)
    assert [loss for _, loss in curve(run_for(config).path)] == pytest.approx(plain.losses, rel=1e-5)


def test_with_another_decay_and_rate_the_first_update_is_the_formulas(line: Lineage) -> None:
    changes = {"optimizer.weight_decay": 0.5, "optimizer.learning_rate": 3e-3, "optimizer.warmup_iters": 0}
    config = line.branch(**changes, **{"train.max_iters": AT + 1})
    loop.train(config)
    before = load_weights(checkpoint(line.run, AT))
    plain = train_plainly(
        written(config, line.folder), range(AT, AT + 1), *plain_state(checkpoint(line.run, AT), config)
    )
    after = load_weights(checkpoint(run_for(config), AT + 1))
    assert all(
        torch.allclose(after[name], weight, rtol=1e-5, atol=1e-7) and not torch.equal(after[name], before[name])
        for name, weight in plain.weights.items()
    )


def test_with_another_batch_size_each_step_takes_its_batch_of_the_new_order(line: Lineage) -> None:
    config = line.branch(**{"train.batch_size": 4, "train.max_iters": AT + 2})
    loop.train(config)
    plain = train_plainly(
        written(config, line.folder), range(AT, AT + 2), *plain_state(checkpoint(line.run, AT), config)
    )
    assert [loss for _, loss in curve(run_for(config).path)] == pytest.approx(plain.losses, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "skipped"), [(8, [6]), (4, [])])
def test_batches_that_the_parents_guard_skips_are_skipped_in_the_same_order_only(
    line: Lineage, batch_size: int, skipped: list[int]
) -> None:
    folder = checkpoint(line.run, AT)
    manifest = Manifest.load(folder)
    manifest.state["guard"]["skipped"] = [6]
    manifest.save(folder)
    config = line.branch(**{"train.batch_size": batch_size, "train.max_iters": AT + 1})
    loop.train(config)
    assert Manifest.load(checkpoint(run_for(config), AT + 1)).state["guard"]["skipped"] == skipped


def test_another_dataset_and_a_longer_context_may_follow(line: Lineage) -> None:
    sources = [{"name": s, "paths": [str(line.folder / f"{s}.txt")], "split": s} for s in ("train", "validation")]
    for source in sources:
        Path(source["paths"][0]).write_text("A different text of peace and war and of the law of the people. " * 99)
    changes = {"data.sources": sources, "data.path": str(line.folder / "other"), "model.context_length": 32}
    config = line.branch(**changes, **{"model.rope_theta": 50_000.0, "train.max_iters": AT + 1})
    prepare_here(config, None)
    loop.train(config)
    origin = run_for(config).origin()
    assert origin is not None
    told = {d.partition(":")[0] for d in origin["differences"]}
    assert {"dataset", "data.path", "model.context_length", "model.rope_theta"} <= told


def test_what_differs_is_told_at_the_start(line: Lineage, capfd: pytest.CaptureFixture[str]) -> None:
    loop.train(line.branch(**{"optimizer.weight_decay": 0.3, "train.max_iters": AT + 1}))
    told = "".join(capfd.readouterr())
    assert "optimizer.weight_decay" in told and "train.max_iters" in told


def test_the_events_say_at_which_step_it_started(line: Lineage) -> None:
    config = line.branch()
    loop.train(config)
    assert [e["step"] for e in events(run_for(config).path, "started")] == [AT]
