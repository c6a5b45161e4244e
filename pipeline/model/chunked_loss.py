"""The output layer and the cross-entropy in one: never more than one chunk of logits in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOSS_CHUNK_TOKENS = 2048
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
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int = LOSS_CHUNK_TOKENS,
    z_loss: float = 0.0,
    compiled: bool = False,
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
        compiled: Let torch.compile make two passes over the logits of eight.
    """
    wants_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    loss, entropy = _LinearCrossEntropy.apply(
        x.flatten(0, -2), weight, targets.flatten(), chunk_tokens, z_loss, compiled, wants_gradients
    )
    return LossParts(loss, entropy)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients beside the loss, while a chunk's logits exist; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        z_loss: float,
        compiled: bool,
        wants_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        device, count = x.device.type, len(targets)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wide = torch.promote_types(low, torch.float32)
        wants_x, wants_weight = (wants_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if wants_weight else None
        losses = torch.empty(count, dtype=wide, device=x.device)
        log_sums = torch.empty_like(losses)
        # One buffer for all chunks: on a CPU, fresh memory of this size costs as much as a pass over it.
        buffer = torch.empty(0 if compiled else min(chunk_tokens, count), len(weight), dtype=wide, device=x.device)
        counted = targets >= 0
        shares = counted / counted.sum().clamp(min=1).to(wide)
        targets = targets.clamp(min=0)
        with torch.autocast(device, enabled=False):
            matrix = weight.to(low)
            for start in range(0, count, chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                chunk = x[rows].to(low)
                if compiled:
                    product, share = chunk @ matrix.T, shares[rows].unsqueeze(-1)
                    losses[rows], log_sums[rows], errors = _compiled()(product, targets[rows], share, z_loss)
                    del product
                    if grad_x is not None:
                        _write_product(grad_x[rows], errors, matrix)
                    if grad_weight is not None:
                        _add_product(grad_weight, errors, chunk)
                    continue
                logits = buffer[: len(chunk)]
                _write_product(logits, chunk, matrix.T)
                sums = _exponentiate(logits, targets[rows], losses[rows], log_sums[rows])
                if grad_x is None and grad_weight is None:
                    continue
                share = shares[rows].unsqueeze(-1)
                factors = share * (1 + 2 * z_loss * log_sums[rows].unsqueeze(-1)) / sums
                errors = _to_errors(logits, targets[rows], factors, share)
                rounded = errors.to(low)
                if grad_x is not None:
                    _write_product(grad_x[rows], rounded, matrix)
                if grad_weight is not None:
                    _add_product(grad_weight, rounded if rounded.is_cuda else errors, chunk)
                del rounded  # in bfloat16 a copy, which would live beside the next chunk's
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.weight_dtype = weight.dtype
        entropy = (losses * shares).sum()
        ctx.mark_non_differentiable(entropy)
        return entropy + z_loss * (log_sums.square() * shares).sum(), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: otherwise two gradients of the weight's size would exist. A second backward raises PyTorch's error.
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x.mul_(grad)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_x, grad_weight, None, None, None, None, None


def _losses_and_errors(logits: Tensor, targets: Tensor, share: Tensor, z_loss: float) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `_exponentiate` and `_to_errors` do, without a step in place, which the compiler would not fuse.

    Args:
        logits: `(tokens, vocab)`.
        targets: `(tokens,)`.
        share: `(tokens, 1)`: what a token's loss is multiplied with.
        z_loss: As in `linear_cross_entropy`.

    Returns:
        The loss of each token, the logarithm of its sum, and the gradient by the logits in their dtype.
    """
    wide = logits.to(share.dtype)
    largest = wide.amax(dim=-1, keepdim=True)
    exponentials = (wide - largest).exp()
    sums = exponentials.sum(dim=-1, keepdim=True)
    log_sums = sums.log() + largest
    places = targets.unsqueeze(-1)
    losses = log_sums - wide.gather(-1, places)
    hit = torch.arange(logits.shape[-1], device=logits.device) == places
    errors = exponentials * (share * (1 + 2 * z_loss * log_sums) / sums) - hit * share
    return losses.squeeze(-1), log_sums.squeeze(-1), errors.to(logits.dtype)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(_losses_and_errors, dynamic=False)


def _exponentiate(logits: Tensor, targets: Tensor, losses: Tensor, log_sums: Tensor) -> Tensor:
    """Makes of logits their exponentials, shifted by the largest, and returns the sum of each row `(tokens, 1)`.

    Writes each token's loss and the logarithm of its unshifted sum.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    target_logits = logits.sub_(largest).gather(-1, targets.unsqueeze(-1))
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    torch.sub(sums.log(), target_logits, out=losses.unsqueeze(-1))
    torch.add(sums.log(), largest, out=log_sums.unsqueeze(-1))
    return sums


def _to_errors(exponentials: Tensor, targets: Tensor, factors: Tensor, share: Tensor) -> Tensor:
    """Makes of exponentials the gradient of the loss by the logits: softmax - one-hot, scaled; returns them."""
    places = targets.unsqueeze(-1)
    return exponentials.mul_(factors).scatter_add_(-1, places, -share)


def _write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Writes `a @ b`, rounded to their dtype, into `out`."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _add_product(total: Tensor, errors: Tensor, chunk: Tensor) -> None:
    """Adds `errors^T @ chunk` to `total` without rounding it first, as a bfloat16 product would."""
    if errors.dtype == total.dtype or total.is_cpu:
        total.addmm_(errors.T.to(total.dtype), chunk.to(total.dtype))
    else:  # only CUDA has a product of bfloat16 that keeps its float32 sums
        total += torch.mm(errors.T, chunk, out_dtype=total.dtype)
