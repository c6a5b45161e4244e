"""An engine that trains, and every way to save it: ours, PyTorch's and DeepSpeed's (benchmarks/checkpoint.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from pipeline.checkpoint.pending import Writer, begin_attempt
from pipeline.checkpoint.saver import CheckpointSaver
from pipeline.config.sections import Config
from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM
from pipeline.run.world import World
from pipeline.train.engine.engine import Engine

OWN = "own, asynchronous"


@dataclass
class Saving:
    """One save under way.

    Attributes:
        before_step: Waits for what must be done before weights change.
        durable: Whether the files are on disk.
        finish: Waits for that.
    """

    before_step: Callable[[], object] = lambda: None
    durable: Callable[[], bool] = lambda: True
    finish: Callable[[], object] = lambda: None


class Bench:
    """An engine that trains, and the peers that save it.

    Args:
        config: The experiment.
        folder: Takes what they write.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        self.model = TransformerLM(**config.model.model_dump())
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.engine = Engine(self.model, config, World(), torch.device("cpu"))
        self.tokens = torch.randint(
            0, config.model.vocab_size, (config.train.batch_size, config.model.context_length + 1)
        )
        begin_attempt(folder, "bench")
        writer = Writer(0, 1, 0, "bench", torch.distributed.HashStore())
        self.saver = CheckpointSaver(folder, writer, config.checkpoint, lambda saved: None)
        self.saves = 0

    def step(self, before_step: Callable[[], object]) -> tuple[float, float]:
        """One training step; its seconds and those it waited for `before_step`."""
        began = time.perf_counter()
        self.engine.zero_grad()
        logits = self.engine(self.tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        self.engine.backward(loss)
        self.engine.reduce_and_clip(1.0, [loss.detach()], False)
        waited = time.perf_counter()
        before_step()
        waited = time.perf_counter() - waited
        self.engine.step()
        return time.perf_counter() - began, waited

    def state(self) -> dict[str, Any]:
        """Weights and moments by name, without a copy."""
        return {f"{key}/{f.name}": t for f in self.engine.fragments() for key, t in f.tensors.items()}

    def peers(self) -> dict[str, Callable[[Path], Saving]]:
        """Every way to save, by name."""
        return {
            OWN: self.own,
            "own, waited for": self.own_synchronous,
            "torch.save": self.torch_save,
            "torch.distributed.checkpoint.save": self.dcp,
            "torch.distributed.checkpoint.async_save": self.dcp_async,
            "DeepSpeed engine.save_checkpoint": self.deepspeed,
        }

    def own(self, path: Path) -> Saving:
        """Ours; goes on in the background."""
        self.saves += 1
        self.saver.save(self.saves, self.engine.fragments(), {"optimizer_steps": self.saves})
        return Saving(self.saver.wait_for_copy, lambda: not self.saver.busy, self.saver.wait)

    def own_synchronous(self, path: Path) -> Saving:
        """Ours, with the loop waiting for it."""
        self.own(path).finish()
        return Saving()

    def torch_save(self, path: Path) -> Saving:
        """One pickle."""
        torch.save(self.state(), path)
        return Saving(finish=lambda: fsync_tree(path))

    def dcp(self, path: Path) -> Saving:
        """PyTorch's sharded format."""
        dcp.save(self.state(), checkpoint_id=path)
        return Saving(finish=lambda: fsync_tree(path))

    def dcp_async(self, path: Path) -> Saving:
        """The same, staged in host memory first."""
        future = dcp.async_save(self.state(), checkpoint_id=path)
        return Saving(durable=future.done, finish=lambda: (future.result(), fsync_tree(path)))

    def deepspeed(self, path: Path) -> Saving:
        """DeepSpeed's own."""
        self.engine._engine.save_checkpoint(str(path), tag="x")
        return Saving(finish=lambda: fsync_tree(path))


def fsync_tree(path: Path) -> None:
    """What the peers leave to the kernel: ours has done it when it says durable."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
