"""The output layer and the cross-entropy in one: never more than one chunk of logits in memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOSS_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at a time; chosen by benchmarks/cross_entropy.py."""


IGNORED = -1
"""A target that counts neither in the mean nor in the gradients; any negative number does the same."""


class LossParts(NamedTuple):
    """The loss of a micro-batch; both are float32 scalars (float64 for float64 inputs)."""

    loss: Tensor
    """What backward starts from: the cross-entropy plus the z-loss."""
    cross_entropy: Tensor
    """Nats per token, without the z-loss; detached."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int = LOSS_CHUNK_TOKENS, z_loss: float = 0.0
) -> LossParts:
    """Returns the mean cross-entropy of the logits x weight^T, chunk by chunk of the tokens.

    Equals `cross_entropy(x @ weight.T, targets)`; softmax and sums are in at least float32. Under autocast the products
    run in autocast's dtype. Backward may run once: it scales in place the gradients that forward computed.

    Args:
        x: `(..., d_model)`.
        weight: `(vocab, d_model)`.
        targets: `(...)` int64, each in `[0, vocab)`, or negative: such a place is ignored.
        chunk_tokens: Largest number of tokens whose logits exist at a time.
        z_loss: Factor of the mean squared log of softmax's denominator, which keeps the logits from drifting
            (Chowdhery et al. 2022, section 5).
    """
    wants_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, entropy = _LinearCrossEntropy.apply(
        x.flatten(0, -2), weight, targets.flatten(), chunk_tokens, z_loss, wants_gradients
    )
    return LossParts(loss, entropy)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, while a chunk's logits exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, z_loss: float, wants_gradients: bool
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(low, torch.float32)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(low)
            grad_x = torch.empty_like(x) if wants_gradients and ctx.needs_input_grad[0] else None
            grad_weight = None
            if wants_gradients and ctx.needs_input_grad[1]:
                grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device)
            losses = torch.empty(len(targets), dtype=wide, device=x.device)
            squares = torch.zeros((), dtype=wide, device=x.device)
            counted = targets >= 0
            shares = counted / counted.sum().clamp(min=1).to(wide)
            targets = targets.clamp(min=0)
            for start in range(0, len(targets), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                places, share = targets[rows].unsqueeze(-1), shares[rows].unsqueeze(-1)
                chunk = x[rows].to(low)
                logits = chunk @ matrix.T
                target_logits = logits.gather(-1, places).to(wide)
                chances = torch.log_softmax(logits, -1, dtype=wide)
                del logits  # as large as the chunk that follows
                minus = chances.gather(-1, places)
                losses[rows] = (-minus * share).squeeze(-1)
                log_sums = target_logits - minus
                if z_loss:
                    squares += (log_sums.square() * share).sum()
                if grad_x is None and grad_weight is None:
                    continue
                chances.exp_().mul_(share * (1 + 2 * z_loss * log_sums) if z_loss else share)
                chances.scatter_add_(-1, places, -share)
                errors = chances.to(low)
                del chances
                if grad_x is not None:
                    grad_x[rows] = errors @ matrix
                if grad_weight is not None:
                    _add_product(grad_weight, errors.T, chunk)
            entropy = losses.sum()
            loss = entropy + z_loss * squares if z_loss else entropy.clone()
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: otherwise two gradients of the weight's size would exist. A second backward raises PyTorch's error.
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds `a @ b` to `total`, which may be wider than both."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:  # only CUDA's product writes its float32 sums without rounding them
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b
