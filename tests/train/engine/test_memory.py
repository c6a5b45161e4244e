"""The memory of a load: a rank's own share of weights and moments and one fragment, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes
from tests.train.conftest import Lab
from tests.train.loading import load_state, save_state

MB = 2**20
BIG = {
    "model.d_model": 512,
    "model.num_layers": 4,
    "model.num_heads": 8,
    "model.d_ff": 2048,
    "train.micro_batch_size": 1,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


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
