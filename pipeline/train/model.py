"""The model of an experiment: fresh, or loaded from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.checkpoint.weights import load_weights
from pipeline.config.sections import Config
from pipeline.model.transformer import TransformerLM


def build_model(config: Config) -> TransformerLM:
    """Returns a model of the config's shape with fresh weights, on the CPU."""
    return TransformerLM(**config.model.model_dump())


def load_model(config: Config, checkpoint: Path) -> TransformerLM:
    """Returns the model of a checkpoint for a single process that does not train it.

    It is on the GPU if there is one and `train.device` is not `cpu`; a run that trained on GPUs loads without one too.

    Args:
        config: The experiment.
        checkpoint: The checkpoint's folder.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    model = build_model(config)
    model.load_state_dict(load_weights(checkpoint))
    usable = config.train.device != "cpu" and torch.cuda.is_available()
    return model.to("cuda" if usable else "cpu").eval()
