"""An average is what numpy computes in float64, rounded once, whatever wrote the checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint import average
from pipeline.checkpoint.average import shares, write_average
from pipeline.checkpoint.host_copy import OwnedFragment
from pipeline.checkpoint.layout import KEYS, Manifest, published
from pipeline.checkpoint.read import verify
from pipeline.checkpoint.saver import Saved
from pipeline.checkpoint.weights import load_weights
from pipeline.errors import UsageError
from tests.checkpoint.support import saver

SHAPES = {"a.weight": (3, 7), "b.weight": (50,), "c.weight": (2, 2)}


def checkpoint(folder: Path, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(step)
    fragments = []
    for name, shape in shapes.items():
        weight = torch.randn(shape).flatten()
        fragments.append(OwnedFragment(name, shape, 0, dict.fromkeys(KEYS, weight)))
    reports: list[Saved] = []
    one = saver(folder, reports, keep_last=100)
    one.save(step, fragments, {})
    one.wait()
    assert reports[-1].error is None
    return published(folder)[0]


def averaged(folder: Path, checkpoints: list[Path], weighting: str = "uniform") -> dict[str, torch.Tensor]:
    folder.mkdir()
    write_average(folder, checkpoints, weighting, {})
    verify(folder)
    return load_weights(folder)


@pytest.mark.parametrize(("block", "file_bytes"), [(1 << 22, 1 << 30), (16, 100)])
def test_the_average_of_eight_is_that_of_numpy_within_one_rounding(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, file_bytes: int
):
    monkeypatch.setattr(average, "_BLOCK", block)
    monkeypatch.setattr(average, "FILE_BYTES", file_bytes)
    eight = [checkpoint(folder, step) for step in range(1, 9)]
    found = averaged(tmp_path / "average", eight)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == SHAPES
    for name, weight in found.items():
        exact = np.mean([load_weights(one)[name].numpy().astype(np.float64) for one in eight], axis=0)
        assert np.all(np.abs(weight.numpy() - exact) <= np.spacing(np.abs(weight.numpy())))
    assert len(Manifest.load(tmp_path / "average").files) == (1 if file_bytes > 1000 else 3)


@pytest.mark.parametrize("weighting", ["uniform", "1-sqrt"])
def test_the_average_of_one_is_that_one_bit_for_bit(folder: Path, tmp_path: Path, weighting: str):
    one = checkpoint(folder, 1)
    found, before = averaged(tmp_path / "average", [one], weighting), load_weights(one)
    assert all(torch.equal(found[name], before[name]) for name in SHAPES)


def test_1_sqrt_counts_what_training_did_as_such_a_decay_would():
    counts = shares(4, "1-sqrt")
    assert sum(counts) == pytest.approx(1)
    # What happened before checkpoint k reached it and all later ones.
    assert [sum(counts[k:]) for k in range(4)] == pytest.approx([1 - (k / 4) ** 0.5 for k in range(4)])


def test_checkpoints_of_another_model_are_refused(folder: Path, tmp_path: Path):
    pair = [checkpoint(folder, 1, {"a.weight": (3, 7)}), checkpoint(folder, 2)]
    with pytest.raises(UsageError, match="step_00000001"):
        averaged(tmp_path / "average", pair)
