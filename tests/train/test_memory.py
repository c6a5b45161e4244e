"""What a load takes: a rank's own share of weights and moments and one fragment, whatever the size of the model."""

from __future__ import annotations

import gc
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoint.draft import Writer, begin_attempt
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.write import CheckpointSaver, Saved
from pipeline.config import CheckpointConfig
from pipeline.config_load import load_config
from pipeline.model.transformer import TransformerLM
from pipeline.train import ranks
from pipeline.train.engine import Engine
from pipeline.train.world import World
from tests import processes
from tests.train.conftest import Lab

MB = 2**20
BIG = {
    "model.d_model": 512,
    "model.num_layers": 4,
    "model.num_heads": 8,
    "model.d_ff": 2048,
    "train.micro_batch_size": 1,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def private_bytes() -> int:
    """Memory of this process that no file backs: what pages of mapped checkpoint files are not."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


class Peak:
    """The most private memory while it is entered, looked at every millisecond."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.most = private_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, private_bytes())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def new_engine(config_file: str, stage: int, world: World) -> Engine:
    config = load_config(config_file, [f"train.zero_stage={stage}"])
    torch.manual_seed(0)
    return Engine(TransformerLM(**config.model.model_dump()), config, world, torch.device("cpu"))


def save_state(world: World, config_file: str, folder: str, stage: int) -> None:
    engine, reports = new_engine(config_file, stage, world), list[Saved]()
    if world.is_first:
        begin_attempt(Path(folder), "a")
    ranks.barrier(world)
    writer = Writer(world.rank, world.size, stage, "a", ranks.store())
    saver = CheckpointSaver(Path(folder), writer, CheckpointConfig(), reports.append)
    saver.save(1, engine.fragments(), {"optimizer_steps": 1})
    saver.wait()
    assert not [r for r in reports if r.error], reports


def load_state(world: World, config_file: str, folder: str, stage: int) -> dict[str, Any]:
    """Bytes: at most more than before the load, the rank's share, and the largest fragment of the file."""
    engine = new_engine(config_file, stage, world)
    # Allocations once made stay with the process: the pieces below must not come out of room that was left over.
    torch.empty(1)
    with Peak() as peak:
        reader = CheckpointReader(Path(folder) / "step_00000001")
        engine.load(reader)
        reader.close()
    fragments = [f for name in reader.manifest.parameters for f in reader.manifest.fragments(name)]
    return {
        "grown": peak.most - peak.before,
        "share": sum(t.nbytes for f in engine.fragments() for t in f.tensors.values()),
        "fragment": 4 * max(f.length for f in fragments),
        "whole": 12 * sum(f.length for f in fragments),
    }


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
