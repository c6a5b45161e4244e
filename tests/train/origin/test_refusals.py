"""What a run cannot branch from is refused with exit status 2, and nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline.train.loop as loop
from pipeline.checkpoint.layout import Manifest
from pipeline.checkpoint.pins import pins
from pipeline.config.sections import Config
from pipeline.errors import PipelineError, UsageError
from pipeline.run.folder import run_for
from tests.checkpoint.support import flip_a_bit
from tests.train.origin.lineage import AT, Lineage, checkpoint


def spoilt(name: str, spoil: Callable[[Path], None]) -> Callable[[Lineage], Config]:
    def config(line: Lineage) -> Config:
        spoil(checkpoint(line.run, AT) / name)
        return line.branch()

    return config


def linked(file: Path) -> None:
    outside = file.parents[4] / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def of_other_shape(line: Lineage) -> Config:
    folder = checkpoint(line.run, AT)
    manifest = Manifest.load(folder)
    manifest.parameters["ln_final.weight"]["shape"] = [4, 4]
    manifest.save(folder)
    return line.branch()


def of_config(value: Any) -> Callable[[Lineage], Config]:
    def config(line: Lineage) -> Config:
        folder = checkpoint(line.run, AT)
        manifest = Manifest.load(folder)
        manifest.state["config"] = value
        manifest.save(folder)
        return line.branch()

    return config


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"data": found}
    return found


RANK, MANIFEST = "rank_00000.safetensors", "manifest.json"
REFUSED: dict[str, tuple[Callable[[Lineage], Config], str]] = {
    "several at once": (
        lambda line: line.branch(**{"model.d_ff": 64, "model.num_heads": 1, "train.max_iters": AT}),
        "model.num_heads.*model.d_ff.*train.max_iters",
    ),
    "tied": (lambda line: line.branch(**{"model.tie_embeddings": True}), "model.tie_embeddings"),
    "no such step": (lambda line: line.branch(**{"init.step": 5}), "allowed: 10, 8, 4"),
    "step of a checkpoint": (lambda line: line.branch(place=checkpoint(line.run, AT)), "init.step"),
    "no such folder": (lambda line: line.branch(place=line.folder / "nowhere"), "nowhere"),
    "no run": (lambda line: line.branch(place=line.folder), "is not a run folder"),
    "itself": (lambda line: line.branch(line.run.name), "init.from"),
    "flipped bit": (spoilt(RANK, flip_a_bit), "rank_00000"),
    "truncated": (spoilt(RANK, lambda file: os.truncate(file, 100)), "rank_00000"),
    "missing": (spoilt(RANK, Path.unlink), "rank_00000"),
    "a link out of it": (spoilt(RANK, linked), "leads out of"),
    "a FIFO": (spoilt(RANK, fifo), "not a regular file"),
    "torn manifest": (spoilt(MANIFEST, lambda file: os.truncate(file, 100)), "manifest.json"),
    "other parameters than its config": (of_other_shape, "ln_final.weight"),
    "an empty config": (of_config({}), "model"),
    "a config that is nested deeply": (of_config(nested(700)), "nested|model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_status_2_and_nothing_is_written(case: str, line: Lineage) -> None:
    make, words = REFUSED[case]
    config = make(line)
    before, runs = line.digests() if case != "a FIFO" else {}, sorted(line.run.path.parent.iterdir())
    with pytest.raises(UsageError, match=f"(?s){words}") as refused:
        loop.train(config)
    assert refused.value.exit_code == 2
    assert sorted(line.run.path.parent.iterdir()) == runs
    assert before in ({}, line.digests())
    assert pins(line.run.checkpoints) == []


def test_data_of_another_tokenizer_is_refused(line: Lineage) -> None:
    folder = checkpoint(line.run, AT)
    manifest = Manifest.load(folder)
    for state in (manifest.state | {"tokenizer": "0" * 64}, {**manifest.state, "tokenizer": None}):
        manifest.state.clear()
        manifest.state.update({name: value for name, value in state.items() if value is not None})
        manifest.save(folder)
        if "tokenizer" not in manifest.state:  # as earlier versions wrote it: the run folder tells
            line.run.tokenizer_file.write_text("{}")
        with pytest.raises(UsageError, match="tokenizer"):
            loop.train(line.branch())


def test_if_the_run_folder_cannot_be_made_no_pin_stays(line: Lineage) -> None:
    config = line.branch()
    run_for(config).path.write_text("in the way")
    with pytest.raises(PipelineError, match="run folder"):
        loop.train(config)
    assert pins(line.run.checkpoints) == []
