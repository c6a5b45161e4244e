"""An average is a run folder that sampling, exporting and evaluating take like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import pipeline.commands.average as module
from pipeline.checkpoint.layout import published
from pipeline.checkpoint.weights import load_weights
from pipeline.commands.export import export_run
from pipeline.commands.sample import sample_run
from pipeline.launch.watch.status import statuses
from pipeline.run.folder import Run, open_run
from pipeline.run.records import ancestry
from pipeline.train.evaluate import evaluate_run
from tests.checkpoint.support import flip_a_bit
from tests.data.helpers import command

Save = Callable[..., None]


@pytest.fixture
def trained(run: Run, save: Save) -> Run:
    for step in (1, 2, 3):
        save(step)
    return run


def test_an_average_is_used_like_a_run(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "mean"
    assert command("average", str(trained.path), "--steps", "3,1", "--output", str(output)) == 0
    made = open_run(output)
    (checkpoint,) = published(made.checkpoints)
    first, last = (load_weights(trained.checkpoints / f"step_0000000{step}") for step in (1, 3))
    assert checkpoint.name == "step_00000003"
    for name, weight in load_weights(checkpoint).items():
        assert torch.allclose(weight, (first[name] + last[name]) / 2, atol=1e-7)
    assert sample_run(made, "We")[0].startswith("We")
    assert evaluate_run(made).step == 3
    assert export_run(made, "hf").is_dir()
    (status,) = statuses([made])
    assert (status.state, status.reason) == ("finished", "not trained: the uniform average of 2 checkpoints up to that")
    capsys.readouterr()
    assert command("evaluate", str(output)) == 0
    assert capsys.readouterr().err == "", "there is no store to say anything about"
    assert str(trained.path) in ancestry(made.origin())[0] and "2 checkpoints" in ancestry(made.origin())[0]


def test_the_newest_are_averaged(trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "mean"
    assert command("average", str(trained.path), "--last", "2", "--weights", "1-sqrt", "--output", str(output)) == 0
    assert "2, 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--last", "4"], "--last 4"),
        (["--steps", "1,5"], "step 5"),
        (["--steps", "1,x"], "1,x"),
        (["--last", "2", "--steps", "1"], "--steps"),
        ([], "--last"),
        (["--last", "2", "--weights", "best"], "best"),
    ],
)
def test_what_cannot_be_averaged_is_named_and_nothing_is_written(
    trained: Run, tmp_path: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
):
    before = set(tmp_path.iterdir())
    assert command("average", str(trained.path), *arguments, "--output", str(tmp_path / "mean")) == 2
    assert named in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_an_existing_folder_is_not_replaced_and_a_damaged_checkpoint_not_used(trained: Run, tmp_path: Path):
    assert command("average", str(trained.path), "--last", "2", "--output", str(trained.path)) == 2
    flip_a_bit(next((trained.checkpoints / "step_00000002").glob("rank_*")))
    before = set(tmp_path.iterdir())
    assert command("average", str(trained.path), "--last", "2", "--output", str(tmp_path / "mean")) == 1
    assert set(tmp_path.iterdir()) == before


def test_a_failure_in_between_leaves_nothing(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(module, "write_average", full)
    assert command("average", str(trained.path), "--last", "2", "--output", str(tmp_path / "mean")) == 1
    assert set(tmp_path.iterdir()) == before
