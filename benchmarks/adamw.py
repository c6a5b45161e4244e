"""Measures one AdamW step: ours, its formula compiled, and torch's loop, foreach and fused.

python -m benchmarks.adamw
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.harness import interleaved, refuse_arguments, save
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW, adamw_formula

ROUNDS = 15
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def one_flat_tensor(parameters: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.cat([p.detach().view(-1) for p in parameters]))]


def compiled_formula(parameters: list[torch.nn.Parameter]) -> Callable[[], None]:
    """Returns a step of the compiled formula, in place."""

    def step(weight: torch.Tensor, grad: torch.Tensor, *moments: torch.Tensor) -> None:
        old = (weight, *moments)
        for target, new in zip(old, adamw_formula(weight, grad, *moments, torch.tensor(3.0), **SETTINGS), strict=True):
            target.copy_(new)

    compiled = torch.compile(step, dynamic=True)
    tensors = [(p.detach(), p.grad, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def steps() -> None:
        for each in tensors:
            compiled(*each)

    return steps


def measure(layout: str) -> dict[str, float]:
    torch.manual_seed(0)
    model = TransformerLM(8192, 256, 320, 4, 5, 853, 10000.0)
    flat = layout == "one flat tensor"

    def parameters() -> list[torch.nn.Parameter]:
        copies = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        copies = one_flat_tensor(copies) if flat else copies
        for p in copies:
            p.grad = torch.randn_like(p)
        return copies

    by_device = AdamW(parameters())
    by_device.counts = torch.tensor(True)
    compiled = compiled_formula(parameters())
    began = time.perf_counter()
    compiled()
    print(f"compiling: {time.perf_counter() - began:.1f} s")
    calls = {
        "own": AdamW(parameters()).step,
        "own, the device decides whether the step counts": by_device.step,
        "own formula, compiled": compiled,
        "torch for-loop": torch.optim.AdamW(parameters(), foreach=False).step,
        "torch foreach": torch.optim.AdamW(parameters(), foreach=True).step,
        "torch fused": torch.optim.AdamW(parameters(), fused=True).step,
    }
    seconds = interleaved(calls, ROUNDS)
    count = sum(p.numel() for p in model.parameters())
    print(f"{layout}: {count / 1e6:.1f}M parameters, {torch.get_num_threads()} threads")
    return {name: round(value * 1e3, 2) for name, value in seconds.items()}


if __name__ == "__main__":
    refuse_arguments(__doc__)
    figures = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for layout in ("one tensor per parameter", "one flat tensor"):
            figures[f"{layout}, {threads} threads"] = measure(layout)
    save("adamw", {"milliseconds_per_step": figures})
