"""Measures output layer and cross-entropy, forward and backward: in chunks, on the whole logits, and PyTorch's.

Time, peak memory beyond the gradients, and the distance of loss and gradients to float64.

python -m benchmarks.cross_entropy
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import interleaved, refuse_arguments, save
from pipeline.model.chunked_loss import LOSS_CHUNK_TOKENS, linear_cross_entropy
from pipeline.model.loss import cross_entropy

WIDTH = 320
TIMED = ((4096, 4096, 11), (4096, 32768, 3))  # tokens, vocabulary, rounds
LARGE = ((4096, 32768), (4096, 131072))
CHUNKS = (512, 1024, 2048)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(F.linear(x, weight), targets)


def by_torch(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def chunked(tokens: int) -> Loss:
    return lambda x, weight, targets: linear_cross_entropy(x, weight, targets, tokens).loss


def inputs(tokens: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, WIDTH) * 0.05).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, vocab, (tokens,))


def gradients(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    value = loss(x, weight, targets)
    return value.detach(), *torch.autograd.grad(value, (x, weight))


def milliseconds(tokens: int, vocab: int, rounds: int) -> dict[str, float]:
    batch = inputs(tokens, vocab, torch.float32)
    peers = {f"chunks of {size}": chunked(size) for size in CHUNKS} | {"whole": whole, "torch": by_torch}
    seconds = interleaved({name: lambda loss=loss: gradients(loss, *batch) for name, loss in peers.items()}, rounds)
    return {name: round(value * 1e3, 1) for name, value in seconds.items()}


def resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_mib(loss: Loss, tokens: int, vocab: int) -> float:
    """Returns the peak memory of forward and backward, without inputs and gradients."""
    batch = inputs(tokens, vocab, torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = resident_mib("VmRSS")
    found = gradients(loss, *batch)
    held = sum(g.numel() * g.element_size() for g in found) / 2**20
    return round(resident_mib("VmHWM") - before - held, 1)


def distances(loss: Loss, dtype: torch.dtype) -> list[float]:
    """Returns the relative distances of the loss and both gradients to float64."""
    x, weight, targets = inputs(3000, 4096, dtype)
    wide = (x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), targets)
    pairs = zip(gradients(loss, x, weight, targets), gradients(whole, *wide), strict=True)
    return [float(f"{float((a.double() - b).norm() / b.norm()):.2g}") for a, b in pairs]


def main() -> None:
    refuse_arguments(__doc__)
    own = chunked(LOSS_CHUNK_TOKENS)
    figures: dict[str, Any] = {"chunk_tokens": LOSS_CHUNK_TOKENS, "milliseconds": {}, "peak_mib": {}, "distance": {}}
    pair = {"chunks": own, "whole": whole}
    for dtype in (torch.float32, torch.bfloat16):
        figures["distance"][str(dtype).removeprefix("torch.")] = {
            who: distances(loss, dtype) for who, loss in pair.items()
        }
    for tokens, vocab in LARGE:
        peaks = {who: peak_mib(loss, tokens, vocab) for who, loss in pair.items()}
        figures["peak_mib"][f"{tokens} tokens, vocabulary {vocab}"] = peaks
        print(vocab, peaks, flush=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for tokens, vocab, rounds in TIMED:
            label = f"{tokens} tokens, vocabulary {vocab}, {threads} threads"
            figures["milliseconds"][label] = milliseconds(tokens, vocab, rounds)
            print(label, figures["milliseconds"][label], flush=True)
    save("cross_entropy", figures, "float32 times and memory; distance: loss, gradient of x, gradient of the weight")


if __name__ == "__main__":
    main()
