"""An engine that trains, and its peers for benchmarks/checkpoint.py: our way to save, PyTorch's and DeepSpeed's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from pipeline.checkpoint.pending import RankIdentity, take_over
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.config.sections import Config
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine

OWN = "own, asynchronous"


@dataclass
class Saving:
    """One save under way."""

    before_step: Callable[[], object] = lambda: None
    """Waits for what must happen before the weights change."""
    durable: Callable[[], bool] = lambda: True
    """Says whether the files are on disk."""
    finish: Callable[[], object] = lambda: None
    """Waits until they are."""


class Bench:
    """An engine that trains, and the peers that save it.

    Args:
        config: The experiment.
        folder: Where the peers write.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        self.engine = Engine(config, World(), torch.device("cpu"))
        self.engine.draw(0)
        self.model = self.engine.module
        self.parameters = sum(p.numel() for p in self.model.parameters())
        torch.manual_seed(0)
        self.tokens = torch.randint(
            0, config.model.vocab_size, (config.train.batch_size, config.model.context_length + 1)
        )
        take_over(folder, "bench")
        identity = RankIdentity(0, 1, 0, "bench", torch.distributed.HashStore())
        self.saver = CheckpointSaver(folder, identity, config.checkpoint, lambda saved: None)
        self.saves = 0

    def step(self, before_step: Callable[[], object]) -> tuple[float, float]:
        """Runs one training step; returns its seconds, and those it waited for `before_step`."""
        began = time.perf_counter()
        self.engine.zero_grad()
        loss, entropy = self.engine.loss(self.tokens[:, :-1], self.tokens[:, 1:])
        self.engine.backward(loss)
        self.engine.reduce_and_clip(1.0, [entropy], False)
        waited = time.perf_counter()
        before_step()
        waited = time.perf_counter() - waited
        self.engine.step()
        return time.perf_counter() - began, waited

    def state(self) -> dict[str, Any]:
        """Returns weights and moments by name, without a copy."""
        return {f"{key}/{f.name}": t for f in self.engine.fragments() for key, t in f.tensors.items()}

    def peers(self) -> dict[str, Callable[[Path], Saving]]:
        """Returns every way to save, by name."""
        return {
            OWN: self.own,
            "own, waited for": self.own_synchronous,
            "torch.save": self.torch_save,
            "torch.distributed.checkpoint.save": self.dcp,
            "torch.distributed.checkpoint.async_save": self.dcp_async,
            "DeepSpeed engine.save_checkpoint": self.deepspeed,
        }

    def own(self, path: Path) -> Saving:
        """Saves our way, in the background."""
        self.saves += 1
        self.saver.save(self.saves, self.engine.fragments(), {"optimizer_steps": self.saves})
        return Saving(self.saver.wait_for_copy, lambda: not self.saver.busy, self.saver.wait)

    def own_synchronous(self, path: Path) -> Saving:
        """Saves our way, with the loop waiting."""
        self.own(path).finish()
        return Saving()

    def torch_save(self, path: Path) -> Saving:
        """Saves one pickle."""
        torch.save(self.state(), path)
        return Saving(finish=lambda: fsync_tree(path))

    def dcp(self, path: Path) -> Saving:
        """Saves in PyTorch's sharded format."""
        dcp.save(self.state(), checkpoint_id=path)
        return Saving(finish=lambda: fsync_tree(path))

    def dcp_async(self, path: Path) -> Saving:
        """Saves in the same format, staged in host memory first."""
        future = dcp.async_save(self.state(), checkpoint_id=path)
        return Saving(durable=future.done, finish=lambda: (future.result(), fsync_tree(path)))

    def deepspeed(self, path: Path) -> Saving:
        """Saves in DeepSpeed's own format."""
        self.engine._engine.save_checkpoint(str(path), tag="x")
        return Saving(finish=lambda: fsync_tree(path))


def fsync_tree(path: Path) -> None:
    """Flushes what the peers leave to the kernel; our save has done so when it reports durable."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
