"""The memory that a start or a load costs a rank: called on real ranks by tests and benchmarks."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.read import CheckpointReader
from pipeline.checkpoint.saver import CheckpointSaver, Saved
from pipeline.config.load import load_config
from pipeline.config.train_sections import CheckpointConfig
from pipeline.run.world import World
from pipeline.train.engine.build import working_dtype
from pipeline.train.engine.engine import Engine
from pipeline.train.ranks import group

MB = 2**20
_M_MMAP_THRESHOLD = -3  # malloc.h


def private_bytes() -> int:
    """Returns the memory of this process that no file backs, so without the pages of mapped checkpoint files."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


class Peak:
    """The peak of private memory inside the context, sampled every millisecond."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.most = private_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._over.is_set():
            self.most = max(self.most, private_bytes())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def new_engine(config_file: str, stage: int, world: World) -> Engine:
    return Engine(load_config(config_file, [f"train.zero_stage={stage}"]), world, torch.device("cpu"))


def fresh_start(world: World, config_file: str) -> dict[str, int]:
    """Returns bytes: before and at the peak of making the engine and drawing its weights, and what they consist of."""
    _return_freed_memory()
    config = load_config(config_file, world_size=world.size)
    with Peak() as peak:
        engine = Engine(config, world, torch.device("cpu"))
        engine.draw(config.train.seed)
    fragments = engine.fragments()
    # Per weight: itself as the passes use it; float32 for its gradient, its master and its two moments.
    each = working_dtype(config.train).itemsize + 4 * 4
    return {
        "before": peak.before,
        "peak": peak.most,
        "share": sum(f.length for f in fragments) * each,
        "parameter": 4 * max(math.prod(f.shape) for f in fragments),
        "whole": 4 * sum(math.prod(f.shape) for f in fragments),
    }


def _return_freed_memory() -> None:
    """Makes the C library return freed blocks above 1 MB at once; by itself it keeps those up to 32 MB for later."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MB)


def save_state(world: World, config_file: str, folder: str, stage: int) -> None:
    engine, reports = new_engine(config_file, stage, world), list[Saved]()
    engine.draw(0)
    if world.is_first:
        take_over(Path(folder), "a")
    group.barrier(world)
    identity = RankIdentity(world.rank, world.size, stage, "a", group.store())
    saver = CheckpointSaver(Path(folder), identity, CheckpointConfig(), reports.append)
    saver.save(1, engine.fragments(), {"optimizer_steps": 1})
    saver.wait()
    assert not [r for r in reports if r.error], reports


def load_state(world: World, config_file: str, folder: str, stage: int) -> dict[str, Any]:
    """Returns bytes: the peak above the level before, the rank's share, and the largest fragment of the file."""
    engine = new_engine(config_file, stage, world)
    # The allocator keeps freed memory: the allocations below must not come from what was left over.
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
