"""The device that a process trains on, and its peak throughput."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

from pipeline.config.sections import Config
from pipeline.errors import UsageError
from pipeline.plan.devices import device_reported
from pipeline.run.world import World

# The settings of PyTorch's allocator, under its present name and its older ones.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """Returns the peak of one device in `train.precision`; None where it is unknown, as on a CPU."""
    if device.type != "cuda":
        return None
    known = device_reported(torch.cuda.get_device_name(device))
    if precision == "fp32" and torch.backends.cuda.matmul.allow_tf32:
        precision = "tf32"
    return known.flops_per_s(precision) if known else None


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
    _let_segments_grow(os.environ)
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _let_segments_grow(environ: MutableMapping[str, str]) -> None:
    """Makes PyTorch extend its blocks of device memory instead of adding new ones, unless the user has set it up.

    The weights that ZeRO-3 gathers, and the last, shorter batch, differ in size: fixed blocks would fragment. PyTorch
    reads the variable with its first allocation. ROCm does not have it.
    """
    if torch.version.hip is None and not any(name in environ for name in _ALLOCATOR_VARIABLES):
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
