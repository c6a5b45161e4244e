"""The output layer and the cross-entropy in one: never more than one chunk of logits in memory."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.model import on_cpu
from pipeline.model.on_cpu import bfloat16_factors, onednn_linear

LOSS_CHUNK_TOKENS = 2048
"""Tokens whose logits exist at a time; chosen by benchmarks/cross_entropy.py."""

_FEWEST_ROWS = 16
"""Of a piece that fits into a cache; fewer cost more calls than they save."""

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
        products: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        rounded_products = False  # of the gradients, while the logits are exact
        onednn = x.is_cpu and low == torch.float32 and on_cpu.MULTIPLY_BY_ONEDNN
        if x.is_cpu and low == torch.bfloat16:  # with AMX, products of float32 round the factors, and no result
            low, products = torch.float32, bfloat16_factors()
            rounded_products = on_cpu.ROUND_PRODUCTS and wants_gradients
        low_grad = torch.bfloat16 if rounded_products else low
        wide = torch.promote_types(low, torch.float32)
        wants_x, wants_weight = (wants_gradients and needed for needed in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if wants_x else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if wants_weight else None
        losses = torch.empty(count, dtype=wide, device=x.device)
        log_sums = torch.empty_like(losses)
        # One buffer for all chunks: on a CPU, fresh memory of this size costs as much as a pass over it.
        fresh = compiled or onednn  # neither writes where it is told
        buffer = torch.empty(0 if fresh else min(chunk_tokens, count), len(weight), dtype=wide, device=x.device)
        look_at = _compiled() if compiled else _look_in_cache if x.is_cpu else _look_at_in_place
        counted = targets >= 0
        shares = counted / counted.sum().clamp(min=1).to(wide)
        targets = targets.clamp(min=0)
        with torch.autocast(device, enabled=False), products:
            matrix = weight.to(low)
            matrix_of_grad = weight.to(low_grad) if rounded_products else matrix
            for start in range(0, count, chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                chunk = x[rows].to(low)
                logits = _product(chunk, matrix.T, None if fresh else buffer[: len(chunk)], onednn)
                share = shares[rows].unsqueeze(-1) if wants_x or wants_weight else None
                losses[rows], log_sums[rows], errors = look_at(logits, targets[rows], share, z_loss)
                if errors is None:
                    continue
                rounded = errors.to(low_grad)
                if grad_x is not None:
                    _product(rounded, matrix_of_grad, grad_x[rows], onednn)
                if grad_weight is not None:
                    _add_product(grad_weight, rounded, x[rows].to(low_grad) if rounded_products else chunk, onednn)
                del logits, errors, rounded  # they would live beside the next chunk's
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


def _look_in_cache(
    logits: Tensor, targets: Tensor, share: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Does what `_look_at_in_place` does, a few rows at a time, so that its passes find them in a CPU's cache."""
    rows = max(_FEWEST_ROWS, on_cpu.CACHED_ELEMENTS // logits.shape[-1])
    shares = itertools.repeat(None) if share is None else share.split(rows)
    pieces = zip(logits.split(rows), targets.split(rows), shares, strict=False)
    losses, log_sums, _ = zip(*(_look_at_in_place(*piece, z_loss) for piece in pieces), strict=True)
    return torch.cat(losses), torch.cat(log_sums), None if share is None else logits


def _look_at_in_place(
    logits: Tensor, targets: Tensor, share: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns what `_look_at` returns, written over the logits, which are wide already."""
    places = targets.unsqueeze(-1)
    largest = logits.amax(dim=-1, keepdim=True)
    target_logits = logits.sub_(largest).gather(-1, places)
    sums = logits.exp_().sum(dim=-1, keepdim=True)
    losses, log_sums = sums.log() - target_logits, sums.log() + largest
    errors = None
    if share is not None:
        errors = logits.mul_(share * (1 + 2 * z_loss * log_sums) / sums).scatter_add_(-1, places, -share)
    return losses.squeeze(-1), log_sums.squeeze(-1), errors


def _look_at(
    logits: Tensor, targets: Tensor, share: Tensor | None, z_loss: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns what the loss needs of a chunk of logits, in the form that torch.compile fuses.

    Args:
        logits: `(tokens, vocab)`.
        targets: `(tokens,)`.
        share: `(tokens, 1)`: what a token's loss is multiplied with; None if no gradients are wanted.
        z_loss: As in `linear_cross_entropy`.

    Returns:
        Each token's loss; the logarithm of its sum of exponentials; the gradient by the logits, in their dtype.
    """
    places = targets.unsqueeze(-1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(dim=-1, keepdim=True)
    exponentials = (wide - largest).exp()
    sums = exponentials.sum(dim=-1, keepdim=True)
    log_sums = sums.log() + largest
    losses, errors = log_sums - wide.gather(-1, places), None
    if share is not None:
        hit = torch.arange(logits.shape[-1], device=logits.device) == places
        errors = exponentials * (share * (1 + 2 * z_loss * log_sums) / sums) - hit * share
        errors = errors.to(logits.dtype)
    return losses.squeeze(-1), log_sums.squeeze(-1), errors


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor, Tensor | None]]:
    return torch.compile(_look_at, dynamic=False)


def _product(a: Tensor, b: Tensor, out: Tensor | None, onednn: bool) -> Tensor:
    """Returns `a @ b`, rounded to their dtype, in `out` if there is one."""
    if out is not None and out.dtype == a.dtype and not onednn:
        return torch.mm(a, b, out=out)
    made = onednn_linear(a, b.T) if onednn else a @ b
    return made if out is None else out.copy_(made)


def _add_product(total: Tensor, errors: Tensor, chunk: Tensor, onednn: bool) -> None:
    """Adds `errors^T @ chunk` to `total`, where it can without rounding it first, as a bfloat16 product does."""
    if onednn:
        total += onednn_linear(chunk.T, errors.T).T
    elif chunk.dtype == total.dtype:
        total.addmm_(errors.T, chunk)
    elif chunk.is_cpu:  # a block at a time: the sum copies each product to float32
        rows = max(_FEWEST_ROWS, on_cpu.CACHED_ELEMENTS // chunk.shape[-1])
        for part, columns in zip(total.split(rows), errors.split(rows, dim=1), strict=True):
            part += columns.T @ chunk
    else:  # only CUDA has a product of bfloat16 that keeps its float32 sums
        total += torch.mm(errors.T, chunk, out_dtype=total.dtype)
