"""Gradient clipping by the global L2 norm."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

_PIECE = 1 << 16  # elements


def squared_norm(grads: Iterable[Tensor]) -> Tensor:
    """Returns the sum of the squares of all elements, float32, on the gradients' device; 0 without gradients."""
    # PyTorch's CPU norm sums a whole tensor in a few float32 lanes, which loses 3% of 2e8 elements.
    pieces = [piece for g in grads for piece in (g.detach().reshape(-1).split(_PIECE) if g.is_cpu else (g.detach(),))]
    if not pieces:
        return torch.zeros(())
    # A norm has its gradient's dtype unless told otherwise, and bfloat16 keeps three digits.
    wide = functools.reduce(torch.promote_types, {piece.dtype for piece in pieces}, torch.float32)
    return torch.stack(torch._foreach_norm(pieces, dtype=wide)).float().square().sum()


@torch.no_grad()
def scale_to_norm(grads: Iterable[Tensor], norm: Tensor, max_norm: float, eps: float = 1e-6) -> None:
    """Scales gradients in place by min(1, max_norm / (norm + eps)), without a host-device sync."""
    kept = list(grads)
    if kept:
        torch._foreach_mul_(kept, (max_norm / (norm + eps)).clamp(max=1.0).to(kept[0].device))


def clip_divisor(norm: Tensor, max_norm: float, eps: float = 1e-6) -> Tensor:
    """Returns what to divide gradients of this norm by, as `scale_to_norm` does, for `AdamW.grad_divisor`."""
    return ((norm + eps) / max_norm).clamp(min=1.0)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float, eps: float = 1e-6) -> Tensor:
    """Scales all gradients in place so that their global L2 norm is at most `max_norm`.

    Args:
        parameters: Parameters; those without a gradient are ignored.
        max_norm: Largest norm.
        eps: Keeps the scale finite (Pascanu et al. 2013, algorithm 1, with PyTorch's eps).

    Returns:
        The norm before clipping, a float32 scalar.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = squared_norm(grads).sqrt()
    scale_to_norm(grads, norm, max_norm, eps)
    return norm
