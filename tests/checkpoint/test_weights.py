"""The whole weights of a checkpoint are the same as a state dict and as a file, however many ranks wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.checkpoint.pending import take_over
from pipeline.checkpoint.read import newest_checkpoint
from pipeline.checkpoint.weights import load_weights, shards, write_weights
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


def test_groups_are_as_large_as_allowed_and_hold_every_parameter_once(checkpoint: Path) -> None:
    together, alone = [["layer.weight", "norm.weight"]], [["layer.weight"], ["norm.weight"]]
    assert shards(checkpoint, torch.float32, 4 * (NUMEL + 6)) == together
    assert shards(checkpoint, torch.float32, 4 * (NUMEL + 6) - 1) == alone
    assert shards(checkpoint, torch.bfloat16, 2 * (NUMEL + 6)) == together
    assert shards(checkpoint, torch.float32, 1) == alone


def test_a_file_in_bfloat16_holds_the_rounded_weights_of_the_named_parameters(checkpoint: Path, tmp_path: Path) -> None:
    write_weights(tmp_path / "w", checkpoint, {}, dtype=torch.bfloat16, names=["norm.weight"])
    found = load_file(tmp_path / "w")
    assert list(found) == ["norm.weight"]
    assert torch.equal(found["norm.weight"], load_weights(checkpoint)["norm.weight"].bfloat16())


def test_names_and_rows_are_changed_as_asked(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    write_weights(file, checkpoint, {}, rename=str.upper, reorder=lambda name, weight: weight.flip(0))
    assert load_file(file)["NORM.WEIGHT"].tolist() == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
