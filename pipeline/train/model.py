"""The model of a checkpoint, for a process that does not train it."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.checkpoint.weights import load_weights
from pipeline.config.sections import Config
from pipeline.model.transformer import TransformerLM


def load_model(config: Config, checkpoint: Path, local_rank: int = 0) -> TransformerLM:
    """Returns the model of a checkpoint for a process that does not train it.

    It is on a GPU if there is one and `train.device` is not `cpu`; a run that trained on GPUs loads without one too.

    Args:
        config: The experiment.
        checkpoint: The checkpoint's folder.
        local_rank: Which of several such processes on this machine this is: each takes a GPU of its own.

    Raises:
        CheckpointError: The checkpoint is damaged.
    """
    model = TransformerLM(**config.model.model_dump(), device=torch.device("meta"))
    model.load_state_dict(load_weights(checkpoint), assign=True)
    usable = config.train.device != "cpu" and torch.cuda.is_available()
    return model.to(torch.device("cuda", local_rank % torch.cuda.device_count()) if usable else "cpu").eval()
