"""The device a process trains on, and what it could do at best."""

from __future__ import annotations

import torch

from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.plan.devices import device_reported
from pipeline.run.world import World


def peak_flops_per_s(device: torch.device) -> float | None:
    """Peak of one device; None where it is not known, as on a CPU: then FLOP/s are shown instead of MFU."""
    if device.type != "cuda":
        return None
    known = device_reported(torch.cuda.get_device_name(device))
    return known.bf16_flops_per_s if known else None


def pick_device(config: Config, world: World) -> torch.device:
    """The device this process trains on.

    Raises:
        UsageError: cuda is asked for and there is none.
    """
    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("train.device is cuda, but PyTorch sees no GPU here; set train.device=auto or cpu")
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
