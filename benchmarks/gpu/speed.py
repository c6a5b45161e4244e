"""Tokens per second, MFU and peak memory of training steps, own and those of transformers' Llama."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import LEARNING_RATE, SIZES, TINY, Case, Size, config_of
from pipeline.config.model_section import ModelConfig
from pipeline.model.flops import flops_per_token, num_parameters
from pipeline.plan.devices import GIB
from pipeline.plan.memory import process_memory
from pipeline.train.ranks.device import peak_flops_per_s

WARM_UP, STEPS = 3, 7
MICRO_BATCHES = 2

VARIANTS: dict[str, dict[str, Any]] = {
    "stage 0": {},
    "stage 2": {"zero_stage": 2},
    "stage 2, compiled": {"zero_stage": 2, "compile": True},
    "stage 3, compiled": {"zero_stage": 3, "compile": True},
    "stage 2, compiled, selective": {"zero_stage": 2, "compile": True, "activation_checkpointing": "selective"},
    "stage 2, compiled, full": {"zero_stage": 2, "compile": True, "activation_checkpointing": "full"},
}
"""All in bf16."""


@dataclass(frozen=True)
class Speed:
    """What one way to train did."""

    size: str
    way: str
    parameters: int
    tokens_per_s: float
    mfu: float | None
    """Fraction of the device's peak; None where that is unknown."""
    peak_gib: float
    """The most device memory that was allocated in a step."""
    planned_gib: float | None
    """What `pipeline plan` expects; None for others' code."""
    step_s: float
    """Median."""
    first_step_s: float
    """Compiling included."""


def all_speeds(device: torch.device, tiny: bool) -> Iterator[Callable[[], Speed]]:
    """Yields the measurements, the most telling ones first."""
    if tiny:
        yield lambda: own(Size("tiny", TINY, 2), "stage 2, compiled", device)
        yield lambda: llama(Size("tiny", TINY, 2), False, device)
        return
    for way, compiled in (("stage 2, compiled", True), ("stage 2", False)):
        for size in SIZES:
            yield lambda s=size, w=way: own(s, w, device)
            yield lambda s=size, c=compiled: llama(s, c, device)
    for way in ("stage 0", *list(VARIANTS)[3:]):
        yield lambda w=way: own(SIZES[-1], w, device)


def own(size: Size, way: str, device: torch.device) -> Speed:
    """Times our engine."""
    config = config_of(
        size.model, size.micro_batch, MICRO_BATCHES, precision="bf16", device=device.type, **VARIANTS[way]
    )
    with _Peak(device) as peak:
        case = Case(config, device)
        batches = list(case.batches())
        seconds = _time(lambda: case.step(batches), device)
    case.close()
    planned = process_memory(config, 1, on_cpu=device.type == "cpu").peak / GIB
    return _speed(size, f"own, {way}", seconds, peak.gib, planned, device)


def llama(size: Size, compiled: bool, device: torch.device) -> Speed:
    """Times the same model of transformers with PyTorch's fused AdamW, in bf16 autocast with float32 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = size.model
    config = LlamaConfig(
        vocab_size=shape["vocab_size"], hidden_size=shape["d_model"], intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["num_layers"], num_attention_heads=shape["num_heads"],
        max_position_embeddings=shape["context_length"], attn_implementation="sdpa",
    )  # fmt: skip
    with _Peak(device) as peak:
        with torch.device(device):
            model = LlamaForCausalLM(config)
        run = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        shape_of_batch = (size.micro_batch, shape["context_length"])
        ids = torch.randint(shape["vocab_size"], shape_of_batch, device=device)

        def step() -> None:
            optimizer.zero_grad()
            for _ in range(MICRO_BATCHES):
                with torch.autocast(device.type, torch.bfloat16):
                    loss: Tensor = run(input_ids=ids, labels=ids).loss / MICRO_BATCHES
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        seconds = _time(step, device)
    return _speed(
        size, "transformers' Llama, " + ("compiled" if compiled else "eager"), seconds, peak.gib, None, device
    )


class _Peak:
    """The device memory that a measurement needs beyond what was held before, in GiB; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self.gib = device.type == "cuda", 0.0

    def __enter__(self) -> _Peak:
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            self.gib = (torch.cuda.max_memory_allocated() - self._before) / GIB


def _time(step: Callable[[], object], device: torch.device) -> list[float]:
    """Returns the seconds of the first step and of `STEPS` more after a warm-up."""
    seconds = []
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return [seconds[0], *seconds[WARM_UP:]]


def _speed(
    size: Size, way: str, seconds: list[float], peak_gib: float, planned_gib: float | None, device: torch.device
) -> Speed:
    shape = size.model
    model = ModelConfig(**shape)
    step_s = statistics.median(seconds[1:])
    rate = size.micro_batch * MICRO_BATCHES * shape["context_length"] / step_s
    peak = peak_flops_per_s(device, "bf16")
    flops = flops_per_token(model)
    mfu = rate * flops / peak if peak else None
    return Speed(size.name, way, num_parameters(model), rate, mfu, peak_gib, planned_gib, step_s, seconds[0])


def as_rows(speeds: list[Speed]) -> list[dict[str, Any]]:
    """Returns the measurements as plain values."""
    return [asdict(speed) for speed in speeds]
