"""What attention computes: rotary positions, scaled dot products, and the cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.model.on_cpu import SHORT_CONTEXT, short_causal_attention


class RotaryEmbedding(nn.Module):
    """Rotates adjacent pairs (2k, 2k+1) by position * theta^(-2k/d) (Su et al. 2021, eq. 34).

    Args:
        theta: Base of the frequencies.
        d_k: Head size; even.
        max_seq_len: Number of positions the tables hold.
        scaling: How a longer context changes the frequencies; see `scaled_frequencies`.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        theta: float,
        d_k: int,
        max_seq_len: int,
        device: torch.device | None = None,
        scaling: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if d_k % 2:
            raise ValueError(f"RoPE rotates pairs, so the head size must be even; it is {d_k}")
        # float64 until the tables are computed: position * frequency loses low bits in long contexts.
        frequencies = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64, device=device) / d_k)
        if scaling is not None:
            frequencies = scaled_frequencies(frequencies, **scaling)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64, device=device), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | slice) -> Tensor:
        """Rotates `(..., seq, d_k)`.

        Args:
            x: Queries or keys; may have more dimensions, the heads, between the leading ones of `positions` and `seq`.
            positions: `(..., seq)` or `(seq,)`, each below `max_seq_len`; or a slice of the positions, which copies
                no table.
        """
        if isinstance(positions, Tensor) and 1 < positions.dim() < x.dim() - 1:
            outer, length = positions.shape[:-1], positions.shape[-1]
            positions = positions.reshape(*outer, *[1] * (x.dim() - 1 - positions.dim()), length)
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.cos[positions].to(wide), self.sin[positions].to(wide)
        pairs = x.to(wide).unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():  # which fuses the parts, and knows no complex numbers
            even, odd = pairs[..., 0], pairs[..., 1]
            rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        else:
            rotated = _Rotation.apply(pairs, torch.complex(cos, sin))
        return rotated.flatten(-2).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the tables but keeps their type: bfloat16 cannot tell one position from the next."""
        cos, sin = self.cos, self.sin
        super()._apply(fn, recurse)
        if self.cos.dtype != cos.dtype:
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self


class _Rotation(torch.autograd.Function):
    """Multiplies pairs, as complex numbers, with numbers of length 1: one pass over memory forward and one backward.

    Autograd's own product would keep the pairs, and compute a gradient of the tables.
    """

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return torch.view_as_real(_complex(pairs) * turns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turns,) = ctx.saved_tensors
        return torch.view_as_real(_complex(grad) * turns.conj()), None


def _complex(pairs: Tensor) -> Tensor:
    """Returns `(..., 2)` as complex numbers, without a copy where the layout in memory allows it."""
    *outer, inner = pairs.stride()
    in_place = inner == 1 and pairs.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in outer)
    return torch.view_as_complex(pairs if in_place else pairs.clone(memory_format=torch.contiguous_format))


def scaled_frequencies(
    frequencies: Tensor,
    kind: str,
    factor: float,
    low_frequency_factor: float = 1.0,
    high_frequency_factor: float = 4.0,
    original_context_length: int | None = None,
) -> Tensor:
    """Returns RoPE's frequencies for a context that is `factor` times as long.

    Args:
        frequencies: In radians per position.
        kind: `linear` divides all of them (Chen et al. 2023); `llama3` divides those whose wavelength is long, leaves
            those whose wavelength is short, and interpolates in between (Grattafiori et al. 2024, section 3.4.1).
        factor: What frequencies are divided by.
        low_frequency_factor: A wavelength is long from the original context length divided by this.
        high_frequency_factor: A wavelength is short up to the original context length divided by this.
        original_context_length: The context before it was extended, in tokens; for `llama3`.

    Raises:
        ValueError: The kind is unknown, or `llama3` lacks the original context length.
    """
    if kind == "linear":
        return frequencies / factor
    if kind != "llama3" or original_context_length is None:
        raise ValueError(f"unknown RoPE scaling {kind} with the original context length {original_context_length}")
    turns = original_context_length * frequencies / (2 * math.pi)
    kept = ((turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Returns softmax(q k^T / sqrt(d_k)) v (Vaswani et al. 2017, eq. 1), computed by PyTorch's fused kernels.

    Args:
        q: `(..., queries, d_k)`.
        k: `(..., keys, d_k)`.
        v: `(..., keys, d_v)`.
        mask: `(..., queries, keys)` bool, True = attend; or None.
        is_causal: Query i sees keys 0..i; excludes a mask.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None = None) -> Tensor:
    """Returns attention in which consecutive queries share keys and values (Ainslie et al. 2023).

    Args:
        q: `(..., heads, queries, d_k)`.
        k: `(..., kv_heads, keys, d_k)`; `heads` is a multiple of `kv_heads`.
        v: `(..., kv_heads, keys, d_v)`.
        is_causal: Query i sees keys 0..i; excludes a mask.
        mask: `(..., 1, queries, keys)` bool, True = attend; or None.
    """
    if (
        is_causal
        and q.is_cpu
        and q.dtype == torch.bfloat16
        and k.shape[-2] <= SHORT_CONTEXT
        and torch.is_grad_enabled()
    ):
        return short_causal_attention(q, k, v)
    group = q.shape[-3] // k.shape[-3]
    if group == 1:
        return scaled_dot_product_attention(q, k, v, mask, is_causal)
    if q.is_cuda and q.dtype == torch.float32:
        # The only kernel there that holds no whole matrix of scores in float32 takes no groups.
        k, v = k.repeat_interleave(group, dim=-3), v.repeat_interleave(group, dim=-3)
        return scaled_dot_product_attention(q, k, v, mask, is_causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)


class KeyValueCache:
    """One layer's keys and values of the tokens seen so far, each `(batch, kv_heads, tokens, head_dim)`."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens and returns all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=-2), torch.cat((self.values, values), dim=-2)
        self.keys, self.values = keys, values
        return keys, values
