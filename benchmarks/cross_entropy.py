"""Measures cross-entropy, forward and backward: ours, the same formula left to autograd, and PyTorch's.

python -m benchmarks.cross_entropy
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import interleaved, save
from pipeline.model.loss import cross_entropy

ROUNDS = 25
SHAPES = ((2048, 4096), (1024, 32768))


def by_autograd(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes `cross_entropy` as it was before its gradient was written by hand."""
    shifted = logits - logits.amax(dim=-1, keepdim=True).detach()
    return (shifted.exp().sum(dim=-1).log() - shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


def measure(rows: int, vocab: int) -> dict[str, float]:
    torch.manual_seed(0)
    logits = torch.randn(rows, vocab, requires_grad=True)
    targets = torch.randint(0, vocab, (rows,))

    def call(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(logits, targets), logits)

    seconds = interleaved(
        {"own": call(cross_entropy), "by autograd": call(by_autograd), "torch": call(F.cross_entropy)}, ROUNDS
    )
    return {name: round(value * 1e3, 1) for name, value in seconds.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    figures = {f"{rows} tokens, vocabulary {vocab}": measure(rows, vocab) for rows, vocab in SHAPES}
    save("cross_entropy", {"milliseconds_forward_and_backward": figures, "threads": 1})
