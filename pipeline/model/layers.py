"""The parts of the transformer: Linear, Embedding, RMSNorm, RoPE, attention, SwiGLU, the block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.chunked_loss import LOSS_CHUNK_TOKENS, linear_cross_entropy

NORM_EPS = 1e-5


class Linear(nn.Module):
    """A linear map without bias, `(..., d_in)` to `(..., d_out)`.

    The weight has shape `(d_out, d_in)` and starts truncated-normal with std sqrt(2 / (d_in + d_out)),
    cut at three standard deviations (Glorot & Bengio 2010, eq. 16, in its normal form).
    """

    def __init__(
        self, d_in: int, d_out: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, device=device, dtype=dtype))
        std = math.sqrt(2.0 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last dimension of `x`."""
        return F.linear(x, self.weight)


class LMHead(Linear):
    """The output layer, `(..., d_model)` to logits `(..., vocab)`, or with targets to the loss in chunks.

    The loss is computed inside this module's call because only there does ZeRO-3 hold the whole weight.
    """

    def forward(
        self,
        x: Tensor,
        targets: Tensor | None = None,
        chunk_tokens: int = LOSS_CHUNK_TOKENS,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> Any:
        """Returns the logits, or the `LossParts` of targets `(...)`; see `linear_cross_entropy`."""
        if targets is None:
            return super().forward(x)
        return linear_cross_entropy(x, self.weight, targets, chunk_tokens, z_loss, compiled)


class Embedding(nn.Module):
    """A table of vectors, `(...)` int64 to `(..., d_model)`; starts truncated-normal, std 1, cut at 3."""

    def __init__(
        self, vocab_size: int, d_model: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, std=1.0, a=-3.0, b=3.0)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks up the vectors of token ids."""
        return F.embedding(token_ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Computed in float32 whatever the input dtype: squares of bfloat16 activations lose too many bits. PyTorch's kernel
    does so too, in one pass over memory on a GPU, but takes only an input and a gain of the same dtype.
    """

    def __init__(
        self, d_model: int, eps: float = NORM_EPS, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `(..., d_model)`; the result has the input's dtype."""
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotates adjacent pairs (2k, 2k+1) by position * theta^(-2k/d) (Su et al. 2021, eq. 34).

    Args:
        theta: Base of the frequencies.
        d_k: Head size; even.
        max_seq_len: Number of positions the tables hold.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, theta: float, d_k: int, max_seq_len: int, device: torch.device | None = None) -> None:
        super().__init__()
        if d_k % 2:
            raise ValueError(f"RoPE rotates pairs, so the head size must be even; it is {d_k}")
        # float64 until the tables are computed: position * frequency loses low bits in long contexts.
        frequencies = theta ** (-torch.arange(0, d_k, 2, dtype=torch.float64, device=device) / d_k)
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
            positions = positions.reshape(*positions.shape[:-1], *[1] * (x.dim() - 1 - positions.dim()), -1)
        cos, sin = self.cos[positions], self.sin[positions]
        pairs = x.float().unflatten(-1, (-1, 2))
        even, odd = pairs[..., 0], pairs[..., 1]
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return rotated.flatten(-2).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Returns x * sigmoid(x), elementwise."""
    return F.silu(x)


def softmax(x: Tensor, dim: int) -> Tensor:
    """Returns exp(x) divided by its sum along `dim`, shifted by the maximum so that nothing overflows."""
    exponentials = (x - x.amax(dim=dim, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


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


class KeyValueCache:
    """One layer's keys and values of the tokens seen so far, each `(batch, heads, tokens, d_head)`."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends new tokens and returns all of them."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=-2), torch.cat((self.values, values), dim=-2)
        self.keys, self.values = keys, values
        return keys, values


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention, with RoPE on queries and keys if a `rope` is given.

    Args:
        d_model: Width; divisible by `num_heads`.
        num_heads: Number of heads.
        rope: Position embedding, shared by all layers; None for attention without positions.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        rope: RotaryEmbedding | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rope = rope
        self.q_proj = Linear(d_model, d_model, device, dtype)
        self.k_proj = Linear(d_model, d_model, device, dtype)
        self.v_proj = Linear(d_model, d_model, device, dtype)
        self.output_proj = Linear(d_model, d_model, device, dtype)

    def forward(self, x: Tensor, positions: Tensor | slice | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """Attends within `(..., seq, d_model)`; with a cache, also to the tokens in it.

        Args:
            x: The new tokens.
            positions: `(..., seq)`, `(seq,)` or a slice; required with a rope.
            cache: Holds the earlier tokens and takes the new ones. After the first call it takes one token at a
                time: a longer chunk would need a mask that is causal inside the chunk.
        """
        q, k, v = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope is not None:
            if positions is None:
                raise ValueError("attention with RoPE needs the positions of the tokens")
            q, k = self.rope(q, positions), self.rope(k, positions)
        if cache is not None:
            k, v = cache.extend(k, v)
        causal = q.shape[-2] > 1
        if causal and q.shape[-2] != k.shape[-2]:
            raise ValueError("a filled cache takes one token at a time")
        heads = scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.output_proj(heads.transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        """Reshapes `(..., seq, d_model)` to `(..., heads, seq, d_head)`."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (Shazeer 2020, eq. 6)."""

    def __init__(
        self, d_model: int, d_ff: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.w3 = Linear(d_model, d_ff, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(..., d_model)` to itself."""
        return self.w2(silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        rope: RotaryEmbedding | None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.ln1 = RMSNorm(d_model, device=device, dtype=dtype)
        self.attn = CausalSelfAttention(d_model, num_heads, rope, device, dtype)
        self.ln2 = RMSNorm(d_model, device=device, dtype=dtype)
        self.ffn = SwiGLU(d_model, d_ff, device, dtype)

    def forward(self, x: Tensor, positions: Tensor | slice, cache: KeyValueCache | None = None) -> Tensor:
        """Maps `(batch, seq, d_model)` to itself."""
        x = x + self.attn(self.ln1(x), positions, cache)
        return x + self.ffn(self.ln2(x))
