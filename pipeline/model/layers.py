"""The parts of the transformer that hold weights: Linear, Embedding, RMSNorm, attention, SwiGLU, the block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.model.attention import KeyValueCache as KeyValueCache
from pipeline.model.attention import RotaryEmbedding, grouped_query_attention
from pipeline.model.attention import scaled_dot_product_attention as scaled_dot_product_attention
from pipeline.model.chunked_loss import LOSS_CHUNK_TOKENS, linear_cross_entropy
from pipeline.model.documents import Layout, document_attention
from pipeline.model.on_cpu import linear, rms_norm

NORM_EPS = 1e-5


class Linear(nn.Module):
    """A linear map, `(..., d_in)` to `(..., d_out)`, without bias unless asked for.

    The weight has shape `(d_out, d_in)` and starts truncated-normal with std sqrt(2 / (d_in + d_out)),
    cut at three standard deviations (Glorot & Bengio 2010, eq. 16, in its normal form). A bias starts at 0.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, device=device, dtype=dtype))
        std = math.sqrt(2.0 / (d_in + d_out))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)
        self.bias = nn.Parameter(torch.zeros(d_out, device=device, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps the last dimension of `x`."""
        return linear(x, self.weight, self.bias) if x.is_cpu else F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table of vectors, `(...)` int64 to `(..., d_model)`; starts truncated-normal, cut at three `std`."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        std: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, std=std, a=-3.0 * std, b=3.0 * std)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Looks up the vectors of token ids."""
        return F.embedding(token_ids, self.weight)


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
        return _logits_or_loss(x, self.weight, targets, chunk_tokens, z_loss, compiled)


class TiedHead(nn.Module):
    """The output layer whose weight is the embedding's (Press & Wolf 2017); it holds no parameter of its own.

    It gets the embedding and not its weight: inside this call, and not before it, ZeRO-3 holds the whole weight.
    """

    def forward(
        self,
        x: Tensor,
        embedding: Embedding,
        targets: Tensor | None = None,
        chunk_tokens: int = LOSS_CHUNK_TOKENS,
        z_loss: float = 0.0,
        compiled: bool = False,
    ) -> Any:
        """Returns what `LMHead` returns."""
        return _logits_or_loss(x, embedding.weight, targets, chunk_tokens, z_loss, compiled)


def _logits_or_loss(
    x: Tensor, weight: Tensor, targets: Tensor | None, chunk_tokens: int, z_loss: float, compiled: bool
) -> Any:
    if targets is None:
        return F.linear(x, weight)
    return linear_cross_entropy(x, weight, targets, chunk_tokens, z_loss, compiled)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019, eq. 4).

    Computed in float32 whatever the input dtype: squares of bfloat16 activations lose too many bits. PyTorch's kernel
    does so too, in one pass over memory on a GPU, but takes only an input and a gain of the same dtype; on a CPU it is
    more passes than `rms_norm` makes, unless torch.compile fuses them.
    """

    def __init__(
        self, d_model: int, eps: float = NORM_EPS, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes `(..., d_model)`; the result has the input's dtype, or on a CPU under autocast that dtype."""
        if x.is_cpu and not torch.compiler.is_compiling():
            low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            return rms_norm(x, self.weight, self.eps, low)
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """Returns x * sigmoid(x), elementwise."""
    return F.silu(x)


def softmax(x: Tensor, dim: int) -> Tensor:
    """Returns exp(x) divided by its sum along `dim`, shifted by the maximum so that nothing overflows."""
    exponentials = (x - x.amax(dim=dim, keepdim=True)).exp()
    return exponentials / exponentials.sum(dim=dim, keepdim=True)


@dataclass(frozen=True)
class Variant:
    """What distinguishes the blocks of one architecture from those of another, beside their sizes."""

    num_kv_heads: int | None = None
    """Heads of keys and values, shared by groups of queries; None for as many as queries."""
    head_dim: int | None = None
    """Size of a head; None for the width divided by the number of heads."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalized before RoPE."""
    norm_eps: float = NORM_EPS
    """Added to the mean square in every norm."""


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention, with RoPE on queries and keys if a `rope` is given.

    Args:
        d_model: Width; without a `head_dim` divisible by `num_heads`.
        num_heads: Number of heads.
        rope: Position embedding, shared by all layers; None for attention without positions.
        variant: The architecture.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        rope: RotaryEmbedding | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        variant: Variant = Variant(),
    ) -> None:
        super().__init__()
        self.head_dim = variant.head_dim or d_model // num_heads
        self.rope = rope
        d_q, d_kv = num_heads * self.head_dim, (variant.num_kv_heads or num_heads) * self.head_dim
        self.q_proj = Linear(d_model, d_q, device, dtype, variant.qkv_bias)
        self.k_proj = Linear(d_model, d_kv, device, dtype, variant.qkv_bias)
        self.v_proj = Linear(d_model, d_kv, device, dtype, variant.qkv_bias)
        self.output_proj = Linear(d_q, d_model, device, dtype)
        self.q_norm = RMSNorm(self.head_dim, variant.norm_eps, device, dtype) if variant.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, variant.norm_eps, device, dtype) if variant.qk_norm else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor | slice | None = None,
        cache: KeyValueCache | None = None,
        documents: Layout | None = None,
    ) -> Tensor:
        """Attends within `(..., seq, d_model)`; with a cache, also to the tokens in it.

        Args:
            x: The new tokens.
            positions: `(..., seq)`, `(seq,)` or a slice; required with a rope.
            cache: Holds the earlier tokens and takes the new ones. After the first call it takes one token at a
                time: a longer chunk would need a mask that is causal inside the chunk.
            documents: Attend only within documents; None if each row is one.
        """
        q, k, v = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            if positions is None:
                raise ValueError("attention with RoPE needs the positions of the tokens")
            q, k = self.rope(q, positions), self.rope(k, positions)
        if cache is not None:
            k, v = cache.extend(k, v)
        if documents is not None:
            heads = document_attention(q, k, v, documents, grouped_query_attention)
            return self.output_proj(heads.transpose(-3, -2).flatten(-2))
        causal = q.shape[-2] > 1
        if causal and q.shape[-2] != k.shape[-2]:
            raise ValueError("a filled cache takes one token at a time")
        heads = grouped_query_attention(q, k, v, is_causal=causal)
        return self.output_proj(heads.transpose(-3, -2).flatten(-2))

    def _split(self, x: Tensor) -> Tensor:
        """Reshapes `(..., seq, heads * head_dim)` to `(..., heads, seq, head_dim)`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)


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
        variant: Variant = Variant(),
    ) -> None:
        super().__init__()
        self.ln1 = RMSNorm(d_model, variant.norm_eps, device, dtype)
        self.attn = CausalSelfAttention(d_model, num_heads, rope, device, dtype, variant)
        self.ln2 = RMSNorm(d_model, variant.norm_eps, device, dtype)
        self.ffn = SwiGLU(d_model, d_ff, device, dtype)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | slice,
        cache: KeyValueCache | None = None,
        documents: Layout | None = None,
    ) -> Tensor:
        """Maps `(batch, seq, d_model)` to itself."""
        x = x + self.attn(self.ln1(x), positions, cache, documents)
        return x + self.ffn(self.ln2(x))
