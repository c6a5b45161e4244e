"""The reference for the engine: the same experiment in plain PyTorch, one process, torch's own AdamW and clipping."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.config.train_sections import OptimizerConfig
from pipeline.data.dataset import open_dataset
from pipeline.data.order.batches import BatchReader
from pipeline.model.transformer import TransformerLM
from pipeline.train.engine.fresh import fill_fresh


@dataclass
class Plain:
    """The outcome of plain training."""

    losses: list[float] = field(default_factory=list)
    """One per step."""
    norms: list[float] = field(default_factory=list)
    """The gradient's norm before clipping, one per step."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """After the last step."""


def new_model(config: Config) -> TransformerLM:
    """Returns the model with which a run of this config starts."""
    model = TransformerLM(**config.model.model_dump())
    for name, parameter in model.named_parameters():
        fill_fresh(parameter.detach().view(-1), name, parameter.shape, config.train.seed)
    return model


def plain_optimizer(model: torch.nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    """Returns torch's own AdamW, which decays matrices and not gains."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=settings.betas, eps=settings.eps)


def learning_rate(step: int, settings: OptimizerConfig) -> float:
    """Linear warm-up, then a cosine down to the minimum."""
    if step < settings.warmup_iters:
        return settings.learning_rate * step / settings.warmup_iters
    assert settings.cosine_cycle_iters is not None
    done = min(1.0, (step - settings.warmup_iters) / (settings.cosine_cycle_iters - settings.warmup_iters))
    span = settings.learning_rate - settings.min_learning_rate
    return settings.min_learning_rate + span * (1 + math.cos(math.pi * done)) / 2


def train_plainly(
    config_file: Path,
    steps: range,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Plain:
    """Trains these steps, each on its whole global batch at once."""
    config = load_config(config_file)
    model = model or new_model(config)
    optimizer = optimizer or plain_optimizer(model, config.optimizer)
    reader = BatchReader(
        open_dataset(config.data.path, "train"), config.data, seed=config.train.seed,
        context_length=config.model.context_length, batch_size=config.train.batch_size,
    )  # fmt: skip
    bf16 = config.train.precision == "bf16"
    found = Plain()
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.optimizer)
        x, y = reader.batch(step, 0, config.train.batch_size)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            logits = model(x)
        loss = functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip_val)
        optimizer.step()
        found.losses.append(float(loss.detach()))
        found.norms.append(float(norm))
    found.weights = {name: p.detach() for name, p in model.named_parameters()}
    return found
