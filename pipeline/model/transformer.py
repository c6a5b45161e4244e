"""The language model: embedding, pre-norm blocks, final norm, head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pipeline.model.attention import KeyValueCache, RotaryEmbedding
from pipeline.model.chunked_loss import LOSS_CHUNK_TOKENS
from pipeline.model.documents import Layout, document_layout
from pipeline.model.layers import NORM_EPS, Embedding, LMHead, RMSNorm, TiedHead, TransformerBlock, Variant

ActivationCheckpointing = Literal["none", "full", "selective"]

_aten = torch.ops.aten
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.linear.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.pipeline.onednn_linear.default,
]
"""The operations whose results selective checkpointing keeps: they are most of a block's time."""


def recomputed(block: Callable[..., Tensor], mode: ActivationCheckpointing) -> Callable[..., Tensor]:
    """Returns a function that calls the block and lets backward recompute it as `activation_checkpointing` says.

    With torch.compile, compile this function and not the block inside it: outside a compiled block, nothing can tell
    which results to keep.
    """

    def checkpointed(*args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return block(*args)
        options: dict[str, Any] = {"use_reentrant": False}
        if mode == "selective":
            # Made here, because torch.compile refuses a function made outside what it compiles.
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _KEPT)
        result: Tensor = checkpoint(block, *args, **options)
        return result

    return block if mode == "none" else checkpointed


class TransformerLM(nn.Module):
    """A decoder-only transformer: token ids `(batch, seq)` to logits `(batch, seq, vocab)`, or to the loss.

    Args:
        vocab_size: Number of tokens.
        context_length: Longest sequence.
        d_model: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Attention heads per block.
        d_ff: Inner width of the feed-forward.
        rope_theta: Base of the position embedding.
        num_kv_heads: Heads of keys and values; None for `num_heads`.
        head_dim: Size of a head; None for `d_model / num_heads`.
        tie_embeddings: Whether the head uses the embedding's weight, which then starts with std 1 / sqrt(d_model).
        qkv_bias: Whether queries, keys and values have biases.
        qk_norm: Whether queries and keys are normalized per head.
        norm_eps: Added to the mean square in every norm.
        rope_scaling: Arguments of `scaled_frequencies`.
        document_mask: Whether the model is trained with attention only within documents.
        device: Where the weights are; on `meta` none is drawn, and the tables of the positions are on the CPU.
        dtype: Of the weights.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        rope_theta: float,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        tie_embeddings: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        norm_eps: float = NORM_EPS,
        rope_scaling: Mapping[str, Any] | None = None,
        document_mask: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.document_mask = document_mask
        self.compiled_blocks = False
        """Whether torch.compile makes the blocks."""
        self.activation_checkpointing: ActivationCheckpointing = "none"
        """What backward recomputes: nothing; each block; or, of each block, all but attention and matrix products."""
        self.loss_chunk_tokens = LOSS_CHUNK_TOKENS
        """Largest number of tokens whose logits exist at a time when there are targets."""
        self.compiled_loss = False
        """Whether torch.compile makes the passes over the logits."""
        self.z_loss = 0.0
        """Factor of the z-loss; see `linear_cross_entropy`."""
        variant = Variant(num_kv_heads, head_dim, qkv_bias, qk_norm, norm_eps)
        std = d_model**-0.5 if tie_embeddings else 1.0
        self.token_embeddings = Embedding(vocab_size, d_model, device, dtype, std)
        tables = None if device is not None and device.type == "meta" else device
        rope = RotaryEmbedding(rope_theta, head_dim or d_model // num_heads, context_length, tables, rope_scaling)
        self.layers = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, rope, device, dtype, variant) for _ in range(num_layers)
        )
        self.ln_final = RMSNorm(d_model, norm_eps, device, dtype)
        self.lm_head = TiedHead() if tie_embeddings else LMHead(d_model, vocab_size, device, dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_embeddings.weight.device

    def forward(
        self,
        token_ids: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
        start: int = 0,
        targets: Tensor | None = None,
        document_starts: Tensor | None = None,
        logits_from: int = 0,
    ) -> Any:
        """Returns the logits of the next token at every position; with targets, the `LossParts` instead.

        Args:
            token_ids: `(batch, seq)` int64.
            caches: One key-value cache per layer, for sampling; see `new_caches`.
            start: Position of the first token: the number of tokens in the caches.
            targets: `(batch, seq)` int64, the tokens that follow.
            document_starts: `(batch, seq)` int64, the position in its row at which the document of each token starts:
                a token sees only its document, and positions restart with each. Without it each row is one document.
            logits_from: The first of these tokens whose logits are returned: those of a long prompt take much memory.

        Raises:
            ValueError: The sequence extends past the context length.
        """
        end = start + token_ids.shape[-1]
        if end > self.context_length:
            raise ValueError(f"a sequence of {end} tokens does not fit the context of {self.context_length}")
        positions: Tensor | slice = slice(start, end)
        layout: tuple[Layout, ...] = ()
        if document_starts is not None:
            layout = (document_layout(document_starts, start, self.compiled_blocks),)
            positions = torch.arange(start, end, device=document_starts.device) - document_starts
        x = self.token_embeddings(token_ids)
        for index, layer in enumerate(self.layers):
            block = recomputed(layer, self.activation_checkpointing)
            x = block(x, positions, caches[index] if caches is not None else None, *layout)
        if logits_from:
            x = x[:, logits_from:]
        embedding = (self.token_embeddings,) if isinstance(self.lm_head, TiedHead) else ()
        options = (self.loss_chunk_tokens, self.z_loss, self.compiled_loss)
        return self.lm_head(self.ln_final(x), *embedding, targets, *options)

    def new_caches(self) -> list[KeyValueCache]:
        """Returns empty key-value caches, one per layer."""
        return [KeyValueCache() for _ in self.layers]
