"""Imports DeepSpeed and wraps a model in its engine, without what we do not need of either."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW


def prepare(device: torch.device) -> None:
    """Imports DeepSpeed for a device; to be called before anything else of it."""
    os.environ["DS_ACCELERATOR"] = device.type
    # DeepSpeed takes the local rank for the device's index, now and in later steps; where Slurm shows each rank only
    # its own GPU, that device does not exist.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    # DeepSpeed calls functions that PyTorch is about to rename; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    deepspeed = _import_without_mlflow()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Otherwise it spends half a minute compiling a shared-memory collective that training never uses.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    # It takes over the process group that exists.
    deepspeed.init_distributed(dist_init_required=False)


def initialize(model: TransformerLM, optimizer: AdamW, settings: dict[str, Any]) -> Any:
    """Returns DeepSpeed's engine around the model.

    Raises:
        UsageError: DeepSpeed refuses the settings.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise UsageError(f"deepspeed: DeepSpeed refuses these settings ({str(error).strip()})") from error
    return engine


def _import_without_mlflow() -> Any:
    """Returns DeepSpeed, imported without its autotuner's mlflow, which costs every rank two seconds of CPU time."""
    if "mlflow" in sys.modules:
        import deepspeed.ops

        return deepspeed
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # makes the import fail, as if it were not installed
    try:
        import deepspeed.ops
    finally:
        del sys.modules["mlflow"]
    return deepspeed
