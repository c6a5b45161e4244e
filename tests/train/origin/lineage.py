"""A trained run, and configs of runs that branch from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pipeline.checkpoint.read import CheckpointReader
from pipeline.config.load import parse_config
from pipeline.config.sections import Config
from pipeline.files import sha256_file
from pipeline.model.transformer import TransformerLM
from pipeline.run.folder import Run
from tests.train.engine.reference import plain_optimizer

AT = 4  # the step from which the runs branch


@dataclass(frozen=True)
class Lineage:
    """A trained run of ten steps, and what may branch from it."""

    config: Config
    run: Run
    folder: Path

    def branch(self, name: str = "branch", place: Path | None = None, **changes: Any) -> Config:
        """The same experiment that starts from a step of the run, changed by dotted keys."""
        tree = json.loads(self.config.model_dump_json())
        tree |= {"name": name, "init": {"from": str(place or self.run.path), "step": AT, "what": "all"}}
        for dotted, value in changes.items():
            *sections, key = dotted.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[key] = value
        return parse_config(yaml.safe_dump(tree))

    def digests(self) -> dict[str, str]:
        """Every file of the run."""
        return {str(f.relative_to(self.run.path)): sha256_file(f) for f in self.run.path.rglob("*") if f.is_file()}


def checkpoint(run: Run, step: int) -> Path:
    return run.checkpoints / f"step_{step:08d}"


def plain_state(folder: Path, config: Config) -> tuple[TransformerLM, torch.optim.Optimizer]:
    """The model and torch's optimizer with the state of a checkpoint."""
    reader, model = CheckpointReader(folder), TransformerLM(**config.model.model_dump())
    optimizer = plain_optimizer(model, config.optimizer)
    for name, parameter in model.named_parameters():
        parameter.data = reader.read_whole("weight", name)
        moments = {key: reader.read_whole(key, name) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(reader.manifest.step)), **moments}
    return model, optimizer


def written(config: Config, folder: Path) -> Path:
    file = folder / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(json.loads(config.model_dump_json())))
    return file
