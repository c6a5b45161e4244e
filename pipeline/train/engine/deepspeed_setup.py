"""Imports DeepSpeed and wraps a model in its engine, without what we do not need of either."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pipeline.errors import UsageError
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW
from pipeline.processes import large_imports

# Those that training uses at any ZeRO stage, by the names of DeepSpeed's TorchBackend.
_COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "broadcast",
)  # fmt: skip


def prepare(device: torch.device) -> None:
    """Imports DeepSpeed for a device; to be called before anything else of it."""
    os.environ["DS_ACCELERATOR"] = device.type
    # DeepSpeed takes the local rank for the device's index, now and in later steps; where Slurm shows each rank only
    # its own GPU, that device does not exist.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    # DeepSpeed calls functions that PyTorch is about to rename; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    with large_imports(), _without("mlflow"):  # which its autotuner would import: two seconds of CPU time on every rank
        import deepspeed.ops
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Otherwise it spends half a minute compiling a shared-memory collective that training never uses.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    # It takes over the process group that exists.
    deepspeed.init_distributed(dist_init_required=False)


def announce_collectives(begin_collective: Callable[[], None]) -> None:
    """Has a function called before each collective that DeepSpeed begins from now on."""
    from deepspeed.comm import comm

    backend = comm.cdb  # lives as long as the process group

    def announced(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def begin(*args: Any, **kwargs: Any) -> Any:
            begin_collective()
            return collective(*args, **kwargs)

        return begin

    for name in _COLLECTIVES:
        setattr(backend, name, announced(getattr(type(backend), name).__get__(backend)))


def initialize(model: TransformerLM, optimizer: AdamW, settings: dict[str, Any]) -> Any:
    """Returns DeepSpeed's engine around the model.

    Raises:
        UsageError: DeepSpeed refuses the settings.
    """
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        with _without_compiler():
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
    except (ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise UsageError(f"deepspeed: DeepSpeed refuses these settings ({str(error).strip()})") from error
    return engine


@contextlib.contextmanager
def _without(module: str) -> Iterator[None]:
    """Lets imports of a module fail in the block, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    return function if function is not None else lambda decorated: decorated


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Leaves functions as they are that would be compiled where they are defined.

    DeepSpeed defines such ones for Muon, which nothing here uses; they would import the compiler, a second of CPU time
    on every rank. At stage 3 its hooks import it all the same.
    """
    real = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real
