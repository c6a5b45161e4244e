"""The device that a process trains on, and its peak throughput."""

from __future__ import annotations

import torch

from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.plan.devices import device_reported
from pipeline.run.world import World


def peak_flops_per_s(device: torch.device) -> float | None:
    """Returns the peak of one device; None where it is unknown, as on a CPU: then FLOP/s are shown instead of MFU."""
    if device.type != "cuda":
        return None
    known = device_reported(torch.cuda.get_device_name(device))
    return known.bf16_flops_per_s if known else None


def pick_device(config: Config, world: World) -> torch.device:
    """Selects and returns the device that this process trains on.

    Raises:
        UsageError: The config demands cuda and there is none.
    """
    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("train.device is cuda, but PyTorch sees no GPU here; set train.device=auto or cpu")
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
