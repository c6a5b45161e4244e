"""The whole weights of a checkpoint are the same as a state dict and as a file, however many ranks wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.checkpoint.weights import load_weights, write_weights
from tests.checkpoint.support import NUMEL, fragments, saver


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two ranks and two parameters; its elements are the numbers of the ranks."""
    take_over(tmp_path, "a1")
    both = [saver(tmp_path, [], rank, 2) for rank in range(2)]
    for rank, one in enumerate(both):
        parts = [*fragments(float(rank), rank, 2), *fragments(float(rank), rank, 2, numel=6, name="norm.weight")]
        one.save(1, parts, {})
    for one in both:
        one.wait()
    return newest_checkpoint(tmp_path)


def test_the_file_holds_the_state_dict_aligned_and_with_its_metadata(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_weights(checkpoint)
    assert weights["norm.weight"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]
    assert weights["layer.weight"].sum() == NUMEL // 2
    file = tmp_path / "weights.safetensors"
    for padding in range(8):  # the header's length takes every remainder
        metadata = {"step": "1" * (padding + 1)}
        write_weights(file, checkpoint, metadata)
        found = load_file(file)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == metadata


def test_names_and_rows_are_changed_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(file, checkpoint, {}, rename=str.upper, reorder=lambda name, weight: weight.flip(0))
    assert load_file(file)["NORM.WEIGHT"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
