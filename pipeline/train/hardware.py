"""The device a process trains on, and what it could do at best."""

from __future__ import annotations

import torch

from pipeline.config import Config
from pipeline.errors import UsageError
from pipeline.train.world import World

# Dense bfloat16 tensor-core peaks without sparsity, from the vendors' data sheets, FLOP/s.
_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A40": 150e12,
    "V100": 125e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops_per_s(device: torch.device) -> float | None:
    """Peak of one device; None where it is not known, as on a CPU: then FLOP/s are shown instead of MFU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if all(word in name for word in part.split())), None)


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
