"""Cross-entropy with a hand-written gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean of -log softmax(logits)[target], in nats.

    Computed in at least float32 and shifted by the largest logit, so that logits of any size do not overflow.

    Args:
        logits: `(..., vocab)`.
        targets: `(...)` int64, each in `[0, vocab)`.
    """
    return _CrossEntropy.apply(logits, targets)


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient as (softmax - one-hot) / n, which keeps one tensor of the logits' size and makes one more.

    The logits are the largest tensor of a step; autograd would keep two of that size and make three more.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        shifted = wide - wide.amax(dim=-1, keepdim=True)
        target_logits = shifted.gather(-1, targets.unsqueeze(-1))
        weights = shifted.exp_()
        sums = weights.sum(dim=-1, keepdim=True)
        ctx.save_for_backward(weights, sums, targets)
        ctx.dtype = logits.dtype
        return (sums.log() - target_logits).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weights, sums, targets = ctx.saved_tensors
        share = grad / targets.numel()
        result = weights * (share / sums)
        places = targets.unsqueeze(-1)
        result.scatter_add_(-1, places, -share.expand_as(places))
        return result.to(ctx.dtype), None
