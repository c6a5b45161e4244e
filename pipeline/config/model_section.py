"""The shape of the model: its sizes, and what distinguishes its architecture from others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pipeline.config.section_base import Count, Positive, Section, rule, wrong_value
from pipeline.errors import Problem


class RopeScaling(Section):
    """How a longer context changes the frequencies of the position embedding."""

    kind: Literal["linear", "llama3"]
    """`linear` divides all frequencies; `llama3` only those whose wavelength is long."""
    factor: Positive
    """What frequencies are divided by."""
    low_frequency_factor: Positive = 1.0
    """`llama3`: a wavelength is long from `original_context_length` divided by this."""
    high_frequency_factor: Positive = 4.0
    """`llama3`: a wavelength is short up to `original_context_length` divided by this."""
    original_context_length: Count | None = None
    """`llama3`: the context before it was extended, in tokens."""

    @rule
    def _llama3_knows_the_context_before(self) -> Iterator[Problem]:
        if self.kind == "llama3" and self.original_context_length is None:
            yield Problem("original_context_length", "is missing; kind: llama3 needs it")

    @rule
    def _long_wavelengths_are_longer_than_short_ones(self) -> Iterator[Problem]:
        if self.low_frequency_factor >= self.high_frequency_factor:
            least = f"more than low_frequency_factor = {self.low_frequency_factor}"
            yield wrong_value("high_frequency_factor", self.high_frequency_factor, least)


class ModelConfig(Section):
    """Shape of the pre-norm decoder-only transformer."""

    vocab_size: Count
    """Number of token embeddings; a trained BPE has exactly this many tokens, one from a file may have fewer."""
    context_length: Count
    """Longest sequence, in tokens."""
    d_model: Count
    """Width of the residual stream."""
    num_layers: Count
    """Number of transformer blocks."""
    num_heads: Count
    """Attention heads; without `head_dim`, `d_model` must be divisible by it."""
    d_ff: Count
    """Inner width of the SwiGLU feed-forward."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    num_kv_heads: Count | None = None
    """Heads of keys and values, each shared by `num_heads / num_kv_heads` heads of queries; unset, `num_heads`."""
    head_dim: Count | None = None
    """Size of a head; unset, `d_model / num_heads`."""
    tie_embeddings: bool = False
    """The output layer uses the weight of the token embeddings."""
    qkv_bias: bool = False
    """Queries, keys and values have biases."""
    qk_norm: bool = False
    """Normalise the queries and keys of each head before their rotation."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in every norm."""
    rope_scaling: RopeScaling | None = None
    """How a longer context changes the position embedding; unset, not at all."""
    document_mask: bool = False
    """Tokens attend only within their document, and positions restart with each."""

    @rule
    def _heads_divide_the_width_evenly(self) -> Iterator[Problem]:
        if self.head_dim is not None:
            return
        head_dim, rest = divmod(self.d_model, self.num_heads)
        if rest:
            yield wrong_value("d_model", self.d_model, f"a multiple of num_heads = {self.num_heads}")
        elif head_dim % 2:
            even = f"an even head size (d_model / num_heads), not {head_dim}, because RoPE rotates pairs"
            yield wrong_value("num_heads", self.num_heads, even)

    @rule
    def _the_head_size_is_even(self) -> Iterator[Problem]:
        if self.head_dim is not None and self.head_dim % 2:
            yield wrong_value("head_dim", self.head_dim, "an even number, because RoPE rotates pairs")

    @rule
    def _queries_share_keys_evenly(self) -> Iterator[Problem]:
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            yield wrong_value("num_kv_heads", self.num_kv_heads, f"a divisor of num_heads = {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Size of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def d_q(self) -> int:
        """Width of the queries of all heads together."""
        return self.num_heads * self.head_size

    @property
    def d_kv(self) -> int:
        """Width of the keys, and of the values, of all heads together."""
        return self.kv_heads * self.head_size
