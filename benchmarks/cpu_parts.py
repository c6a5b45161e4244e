"""Measures the parts that the model computes in its own way on a CPU beside PyTorch's, forward and backward.

RMSNorm; linear maps and the loss in float32, which differ where MKL is slow; attention in bfloat16 at short contexts;
output layer and loss in bfloat16. Also how much slower bfloat16 gets when all threads allocate from one heap.

python -m benchmarks.cpu_parts
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import interleaved, save
from pipeline.allocator import keep_freed_memory
from pipeline.model.attention import grouped_query_attention
from pipeline.model.chunked_loss import linear_cross_entropy
from pipeline.model.on_cpu import linear, rms_norm

ROUNDS = 15
HEAPS = {"a heap for each thread": {}, "one heap": {"MALLOC_ARENA_MAX": "1"}}
NORMS = {"2048 rows of 288": (2048, 288), "2048 rows of 1024": (2048, 1024)}
MAPS = {"2,048 tokens from 288 to 768": (2048, 288, 768), "2,048 tokens from 768 to 288": (2048, 768, 288)}
HEADS = {"16 x 4 heads of 32, 128 tokens": (16, 4, 128, 32), "8 x 6 heads of 48, 256 tokens": (8, 6, 256, 48)}
HEAD = (2048, 288, 8192)  # tokens, width, vocabulary


def norms(rows: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    x, gain = torch.randn(rows, width).to(dtype).requires_grad_(), torch.ones(width).to(dtype).requires_grad_()
    return _milliseconds(
        {
            "ours": lambda: rms_norm(x, gain, 1e-5, dtype),
            "PyTorch": lambda: F.rms_norm(x, (width,), gain, 1e-5),
        },
        [x, gain],
    )


def maps(rows: int, d_in: int, d_out: int) -> dict[str, float]:
    x, weight = torch.randn(rows, d_in).requires_grad_(), torch.randn(d_out, d_in).requires_grad_()
    return _milliseconds({"ours": lambda: linear(x, weight, None), "PyTorch": lambda: F.linear(x, weight)}, [x, weight])


def attention(batch: int, heads: int, tokens: int, size: int) -> dict[str, float]:
    made = (torch.randn(batch, tokens, heads * size).bfloat16() for _ in range(3))
    parts = [t.unflatten(-1, (heads, size)).transpose(1, 2).requires_grad_() for t in made]
    return _milliseconds(
        {
            "ours": lambda: grouped_query_attention(*parts, is_causal=True),
            "PyTorch": lambda: F.scaled_dot_product_attention(*parts, is_causal=True),
        },
        parts,
    )


def loss(tokens: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, float]:
    x, weight = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(vocab, width).to(dtype)
    weight, targets = (weight * 0.05).requires_grad_(), torch.randint(0, vocab, (tokens,))
    return _milliseconds(
        {
            "ours": lambda: linear_cross_entropy(x, weight, targets).loss,
            "PyTorch": lambda: F.cross_entropy(F.linear(x, weight).float(), targets),
        },
        [x, weight],
    )


def _milliseconds(peers: dict[str, Callable[[], Tensor]], inputs: list[Tensor]) -> dict[str, float]:
    def step(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        upstream = torch.randn_like(forward())
        return lambda: torch.autograd.grad(forward(), inputs, upstream)

    seconds = interleaved({name: step(forward) for name, forward in peers.items()}, ROUNDS)
    return {name: round(value * 1e3, 2) for name, value in seconds.items()}


def one_heap() -> dict[str, Any]:
    """Measures PyTorch's attention with and without a heap for each thread, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cpu_parts", "--attention"]
    return {
        name: float(subprocess.run(command, env=os.environ | limit, check=True, capture_output=True, text=True).stdout)
        for name, limit in HEAPS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", action="store_true", help="measure PyTorch's attention, and nothing else")
    only_attention = parser.parse_args().attention
    keep_freed_memory(largest=(1 << 31) - 1, most=-1)  # as training does
    if only_attention:
        print(attention(8, 6, 256, 48)["PyTorch"])
        return
    figures: dict[str, Any] = {"one heap, PyTorch's attention": one_heap()}
    figures |= {f"linear map, float32, {what}": maps(*shape) for what, shape in MAPS.items()}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        figures |= {f"norm, {name}, {what}": norms(*shape, dtype) for what, shape in NORMS.items()}
        figures[f"loss, {name}, {HEAD[0]} tokens, width {HEAD[1]}, vocabulary {HEAD[2]}"] = loss(*HEAD, dtype)
    figures |= {f"attention, bfloat16, {what}": attention(*shape) for what, shape in HEADS.items()}
    save("cpu_parts", figures, "milliseconds of forward and backward; medians of interleaved rounds")


if __name__ == "__main__":
    main()
