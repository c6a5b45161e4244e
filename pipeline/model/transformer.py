"""The language model: embedding, pre-norm blocks, final norm, untied head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from pipeline.model.chunked_loss import LOSS_CHUNK_TOKENS
from pipeline.model.layers import Embedding, KeyValueCache, LMHead, RMSNorm, RotaryEmbedding, TransformerBlock

ActivationCheckpointing = Literal["none", "full", "selective"]

_aten = torch.ops.aten
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.linear.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.activation_checkpointing: ActivationCheckpointing = "none"
        """What backward recomputes: nothing; each block; or, of each block, all but attention and matrix products."""
        self.loss_chunk_tokens = LOSS_CHUNK_TOKENS
        """Largest number of tokens whose logits exist at a time when there are targets."""
        self.compiled_loss = False
        """Whether torch.compile makes the passes over the logits."""
        self.z_loss = 0.0
        """Factor of the z-loss; see `linear_cross_entropy`."""
        self.token_embeddings = Embedding(vocab_size, d_model, device, dtype)
        tables = None if device is not None and device.type == "meta" else device
        rope = RotaryEmbedding(rope_theta, d_model // num_heads, context_length, tables)
        self.layers = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, rope, device, dtype) for _ in range(num_layers)
        )
        self.ln_final = RMSNorm(d_model, device=device, dtype=dtype)
        self.lm_head = LMHead(d_model, vocab_size, device, dtype)

    def forward(
        self,
        token_ids: Tensor,
        caches: Sequence[KeyValueCache] | None = None,
        start: int = 0,
        targets: Tensor | None = None,
    ) -> Any:
        """Returns the logits of the next token at every position; with targets, the `LossParts` instead.

        Args:
            token_ids: `(batch, seq)` int64.
            caches: One key-value cache per layer, for sampling; see `new_caches`.
            start: Position of the first token: the number of tokens in the caches.
            targets: `(batch, seq)` int64, the tokens that follow.

        Raises:
            ValueError: The sequence extends past the context length.
        """
        end = start + token_ids.shape[-1]
        if end > self.context_length:
            raise ValueError(f"a sequence of {end} tokens does not fit the context of {self.context_length}")
        positions = slice(start, end)
        x = self.token_embeddings(token_ids)
        for index, layer in enumerate(self.layers):
            block = recomputed(layer, self.activation_checkpointing)
            x = block(x, positions, caches[index] if caches is not None else None)
        return self.lm_head(self.ln_final(x), targets, self.loss_chunk_tokens, self.z_loss, self.compiled_loss)

    def new_caches(self) -> list[KeyValueCache]:
        """Returns empty key-value caches, one per layer."""
        return [KeyValueCache() for _ in self.layers]
