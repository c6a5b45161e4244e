"""How often each source is read and what a validation costs, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.check.data import check_data
from pipeline.check.result import Check
from pipeline.config.load import load_config
from pipeline.data.build.build import prepare
from tests.test_bad_input import experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 1,601 tokens, one of 161 and one that is only for validation, of 81."""
    folder = tmp_path_factory.mktemp("checked")
    sources = []
    for name, size, split in (("web", 1600, "train"), ("code", 160, "train"), ("held", 80, "validation")):
        (folder / f"{name}.txt").write_text("x" * size)
        sources.append({"name": name, "paths": [str(folder / f"{name}.txt")], "split": split})
    prepare(load_config(experiment(folder, **{"data.sources": sources})))
    return folder


def checked(folder: Path, *overrides: str) -> dict[str, Check]:
    """The checks of 50 steps of 4 windows of 16 tokens."""
    return {
        one.name: one for one in check_data(load_config(folder / "config.yaml", ["train.max_iters=50", *overrides]))
    }


def phases(*given: tuple[int, dict[str, Any]]) -> str:
    return f"data.phases={json.dumps([{'from_step': step, 'weights': weights} for step, weights in given])}"


def test_without_weights_all_sources_are_read_equally_often(folder: Path) -> None:
    found = checked(folder)["epochs"]
    assert found.status == "ok" and found.found.count("1.82 epochs") == 2, "200 of 110 windows"


def test_the_tokens_and_epochs_are_those_of_the_order(folder: Path) -> None:
    found = checked(folder, phases((0, {"web": 1.0}), (30, {"code": 1.0})))["epochs"]
    assert found.status == "ok"
    assert "web 1.9k tokens, 1.2 epochs" in found.found, "30 steps"
    assert "code 1.3k tokens, 8 epochs" in found.found, "20 steps"


def test_a_source_that_is_read_forty_times_is_a_warning(folder: Path) -> None:
    found = checked(folder, phases((0, {"web": 1.0}), (1, {"code": 1.0})), "train.max_iters=101")["epochs"]
    assert found.status == "warning" and "40 epochs" in found.found and "code" in found.cure and "web" not in found.cure
    unread = checked(folder, phases((0, {"web": 1.0})))["epochs"]
    assert unread.status == "ok" and "code not at all" in unread.found


def test_a_weight_that_nothing_reads_is_a_warning(folder: Path) -> None:
    found = checked(folder, "data.sources.1.weight=9")["epochs"]
    assert found.status == "warning" and "nothing reads the weight of code: set data.mixing=weighted" in found.cure
    assert "nothing reads" not in checked(folder, "data.sources.1.weight=9", "data.mixing=weighted")["epochs"].cure
    assert checked(folder, "data.sources.2.weight=9")["epochs"].status == "ok", "of validation there is no mixture"


def test_a_phase_that_cannot_be_read_fails(folder: Path) -> None:
    found = checked(folder, "data.mixing=weighted", "model.context_length=400")["epochs"]
    assert found.status == "failed" and "code" in found.found


def test_a_validation_that_fills_no_window_fails(folder: Path) -> None:
    found = checked(folder, "model.context_length=100")["validation"]
    assert (
        found.status == "failed"
        and "the validation split: 81 tokens are too few for one window of context_length + 1 = 101" in found.found
    )


def test_validation_is_told_in_steps(folder: Path) -> None:
    found = checked(folder, "train.val_interval=10", "train.num_val_batches=1")["validation"]
    assert found.status == "ok" and "4 windows of held" in found.found
    assert "0.333 steps" in found.found and "3.2%" in found.found
