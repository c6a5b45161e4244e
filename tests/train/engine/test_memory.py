"""The memory of a start or a load: a rank's share of the state and one parameter or fragment, whatever the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes
from tests.train.conftest import Lab
from tests.train.loading import MB, fresh_start, load_state, save_state

BIG = {
    "model.d_model": 512,
    "model.num_layers": 4,
    "model.num_heads": 8,
    "model.d_ff": 2048,
    "train.micro_batch_size": 1,
}

WIDE = {
    "model.vocab_size": 8192,
    "model.d_model": 768,
    "model.num_layers": 5,
    "model.num_heads": 8,
    "model.d_ff": 3072,
    "train.zero_stage": 3,
    "train.micro_batch_size": 1,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_start_at_zero_3_takes_the_ranks_share_and_one_parameter(lab: Lab, tmp_path: Path, precision: str) -> None:
    """Of eight ranks, so that a share is less than the whole model; benchmarks/start.py measures larger ones."""
    config = str(lab.config(f"wide_{precision}", **WIDE, **{"train.precision": precision}))
    for found in processes.on_ranks(fresh_start, 8, tmp_path / "log", config):
        print({key: f"{value / MB:.1f} MB" for key, value in found.items()})
        limit = found["share"] + found["parameter"] + 20 * MB
        assert limit < found["whole"], "otherwise the next line would say little"
        assert found["peak"] - found["before"] < limit


@pytest.mark.parametrize(("writers", "written_at", "stage"), [(2, 2, 2), (2, 3, 3), (1, 0, 3), (2, 3, 2)])
def test_a_load_takes_the_ranks_own_share_and_one_fragment_at_most(
    lab: Lab, tmp_path: Path, writers: int, written_at: int, stage: int
) -> None:
    config = str(lab.config("big", **BIG))
    processes.on_ranks(save_state, writers, tmp_path / "save.log", config, str(tmp_path), written_at)
    for found in processes.on_ranks(load_state, 2, tmp_path / "load.log", config, str(tmp_path), stage):
        print({key: f"{value / MB:.1f} MB" for key, value in found.items()})
        assert found["share"] < 0.6 * found["whole"]
        assert found["grown"] < found["share"] + found["fragment"]
