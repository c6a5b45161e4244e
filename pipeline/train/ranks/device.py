"""The device that a process trains on, and its peak throughput."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

import torch
from torch import Tensor

from pipeline.config.sections import Config
from pipeline.errors import PipelineError, UsageError
from pipeline.plan.devices import device_reported
from pipeline.run.world import GPUS_VARIABLE, World

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


def on_device(tokens: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on the device; copied from pinned memory, because the host waits for any other copy."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


def pick_device(config: Config, world: World) -> torch.device:
    """Selects and returns the device that this process trains on.

    Raises:
        UsageError: The config demands cuda and there is none.
        PipelineError: The job has GPUs that PyTorch cannot use: `auto` would train on the CPU for days.
    """
    wanted = config.train.device
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        given = os.environ.get(GPUS_VARIABLE)
        if given:
            raise PipelineError(
                f"the job has {given} GPUs per node, but PyTorch sees none on {socket.gethostname()}: {_why_no_gpu()}"
            )
        if wanted == "cuda":
            raise UsageError("train.device is cuda, but PyTorch sees no GPU here; set train.device=auto or cpu")
        return torch.device("cpu")
    _let_segments_grow(os.environ)
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _why_no_gpu() -> str:
    """Returns what CUDA or ROCm says: no driver, one that is too old for this PyTorch, a build without it."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).strip().splitlines() or ["it does not say why"])[0]
    return "it does not say why"


def _let_segments_grow(environ: MutableMapping[str, str]) -> None:
    """Makes PyTorch extend its blocks of device memory instead of adding new ones, unless the user has set it up.

    The weights that ZeRO-3 gathers, and the last, shorter batch, differ in size: fixed blocks would fragment. PyTorch
    reads the variable with its first allocation. ROCm does not have it.
    """
    if torch.version.hip is None and not any(name in environ for name in _ALLOCATOR_VARIABLES):
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
