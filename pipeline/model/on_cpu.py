"""Parts of the model for CPUs, where PyTorch's own pass over memory too often, or multiply slower than the CPU can.

Measured by benchmarks/cpu_parts.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

SHORT_CONTEXT = 512
"""Keys up to which the weights of attention are kept. That is faster than PyTorch's kernel, twice as fast at this many;
with more it wins less and takes more memory."""

CACHED_ELEMENTS = 1 << 19
"""Of float32: what two cores of a server have in their second-level caches."""


@contextlib.contextmanager
def bfloat16_factors() -> Iterator[None]:
    """Lets products of float32 matrices round the factors, but not the result, to bfloat16, where the CPU has that."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _about_processor() -> str:
    """Returns what Linux says of the first core; it takes a while to say it of hundreds."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as cores:
        return "".join(itertools.takewhile(str.strip, cores))
    return ""


def _mkl_is_slow(processor: str) -> bool:
    others = bool(processor) and "GenuineIntel" not in processor
    available = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return others and available and torch.backends.cpu.get_cpu_capability() == "AVX512"


_PROCESSOR = _about_processor()

MULTIPLY_BY_ONEDNN = _mkl_is_slow(_PROCESSOR)
"""Whether oneDNN multiplies float32 matrices. PyTorch lets MKL do it, which reaches half of the speed of AVX-512 on
processors that are not Intel's."""

ROUND_PRODUCTS = "avx512_bf16" in _PROCESSOR and "amx_bf16" not in _PROCESSOR
"""Whether products of bfloat16 matrices, whose results are rounded, are faster than of float32 with rounded factors."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x @ weight^T + bias, as `F.linear` does: `(..., d_in)` to `(..., d_out)`."""
    exact = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (exact and MULTIPLY_BY_ONEDNN):
        return F.linear(x, weight, bias)
    mapped: Tensor = _Linear.apply(x, weight, bias)
    return mapped


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns x @ weight^T + bias of float32, multiplied by oneDNN; the weight may be a transposed view."""
    mapped: Tensor = torch.ops.pipeline.onednn_linear(x, weight, bias)
    return mapped


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    mapped: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return mapped


def _shape_of_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _causal_weights(q: Tensor, k: Tensor) -> Tensor:
    """Returns the attention weights of `(n, group * tokens, d_k)` queries and `(n, tokens, d_k)` keys of bfloat16."""
    tokens, factor = k.shape[1], q.shape[-1] ** -0.5
    future = torch.full((tokens, tokens), float("-inf")).triu_(1).repeat(q.shape[1] // tokens, 1)
    weights = _shape_of_causal_weights(q, k)
    at_once = max(1, CACHED_ELEMENTS // future.numel())
    with torch.autocast("cpu", enabled=False), bfloat16_factors():  # autocast would round the scores
        for part, a, b in zip(weights.split(at_once), q.split(at_once), k.split(at_once), strict=True):
            part.copy_(torch.baddbmm(future, a.float(), b.float().transpose(1, 2), alpha=factor).softmax(-1))
    return weights


def _shape_of_causal_weights(q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[1])


# Operations of our own, because torch.compile takes PyTorch's for one whose weights never change, and does not follow
# the setting of the factors. Not by `custom_op`, whose first call imports torch.compile: almost a second.
_LIBRARY = torch.library.Library("pipeline", "DEF")
_LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.impl("onednn_linear", _onednn_linear, "CPU")
_LIBRARY.impl("onednn_linear", _shape_of_linear, "Meta")
_LIBRARY.define("causal_weights(Tensor q, Tensor k) -> Tensor")
_LIBRARY.impl("causal_weights", _causal_weights, "CPU")
_LIBRARY.impl("causal_weights", _shape_of_causal_weights, "Meta")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        inputs, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, len(weight))
        # oneDNN copies its first factor to transpose it: the input, which is mostly smaller than the gradient.
        grad_weight = onednn_linear(inputs.T, rows.T).T if for_weight else None
        return onednn_linear(grad, weight.T) if for_x else None, grad_weight, rows.sum(0) if for_bias else None


def rms_norm(x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Returns x / sqrt(mean(x^2) + eps) * gain over the last dimension, computed in float32, in a dtype.

    Backward keeps x and one number for each row.
    """
    normed: Tensor = _RMSNorm.apply(x, gain, eps, dtype)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _wide(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, scale = ctx.saved_tensors
        grad, normed = _wide(grad), _wide(x) * scale
        products = grad * normed
        grad_gain = products.flatten(0, -2).sum(0).to(gain.dtype)
        along = (products @ _wide(gain)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = torch.mul(grad, gain, out=products).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_gain, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def short_causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns causal attention of bfloat16 that computes the scores of all queries at a time, and keeps the weights.

    PyTorch's kernel computes the scores once forward and once backward, block by block, and each small product costs a
    preparation of its own. The scores are as exact as there: their factors are bfloat16, and they are float32.

    Args:
        q: `(batch, heads, tokens, d_k)`.
        k: `(batch, kv_heads, tokens, d_k)`; `heads` is a multiple of `kv_heads`.
        v: `(batch, kv_heads, tokens, d_v)`.
    """
    heads: Tensor = _ShortCausalAttention.apply(q, k, v)
    return heads


class _ShortCausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.shapes = q.shape, k.shape, v.shape
        tokens, group = q.shape[-2], q.shape[1] // k.shape[1]
        # Queries that share keys are rows of one matrix, so that products over the rows add up the group's gradients.
        rows = q.reshape(-1, group * tokens, q.shape[-1])
        k, v = (part.reshape(-1, tokens, part.shape[-1]) for part in (k, v))
        weights = torch.ops.pipeline.causal_weights(rows, k)
        ctx.save_for_backward(rows, k, v, weights)
        return (weights @ v).view(*q.shape[:-1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad.reshape(*q.shape[:-1], v.shape[-1])
        factor = q.shape[-1] ** -0.5
        grad_v = weights.transpose(1, 2) @ grad
        grad_weights = grad @ v.transpose(1, 2)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        del grad_weights
        grad_q, grad_k = grad_scores @ k, grad_scores.transpose(1, 2) @ q
        grads = (grad_q.mul_(factor), grad_k.mul_(factor), grad_v)
        return tuple(g.view(shape) for g, shape in zip(grads, ctx.shapes, strict=True))
