"""Gradient clipping by the global L2 norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def squared_norm(grads: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of all elements, float32, on the gradients' device; 0 for no gradients."""
    kept = [g.detach() for g in grads]
    if not kept:
        return torch.zeros(())
    return torch.stack([norm.float() for norm in torch._foreach_norm(kept)]).square().sum()


@torch.no_grad()
def scale_to_norm(grads: Iterable[Tensor], norm: Tensor, max_norm: float, eps: float = 1e-6) -> None:
    """Scales gradients in place by min(1, max_norm / (norm + eps)); no host-device sync."""
    kept = list(grads)
    if kept:
        torch._foreach_mul_(kept, (max_norm / (norm + eps)).clamp(max=1.0).to(kept[0].device))


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, eps: float = 1e-6) -> Tensor:
    """Scales all gradients in place so that their global L2 norm is at most `max_norm`.

    Args:
        parameters: Those without a gradient are left out.
        max_norm: Largest norm.
        eps: Keeps the scale finite (Pascanu et al. 2013, algorithm 1, with PyTorch's eps).

    Returns:
        The norm before clipping, a float32 scalar.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = squared_norm(grads).sqrt()
    scale_to_norm(grads, norm, max_norm, eps)
    return norm
