"""The language model: embedding, pre-norm blocks, final norm, untied head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.model.layers import Embedding, KeyValueCache, Linear, RMSNorm, RotaryEmbedding, TransformerBlock


class TransformerLM(nn.Module):
    """A decoder-only transformer: token ids `(batch, seq)` to logits `(batch, seq, vocab)`.

    Args:
        vocab_size: Number of tokens.
        context_length: Longest sequence.
        d_model: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Attention heads per block.
        d_ff: Inner width of the feed-forward.
        rope_theta: Base of the position embedding.
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
        self.activation_checkpointing = False
        """Whether backward recomputes each block instead of keeping its activations."""
        self.token_embeddings = Embedding(vocab_size, d_model, device, dtype)
        # The tables are computed, not loaded: they are real even where the parameters are on the meta device.
        real = None if device is not None and device.type == "meta" else device
        rope = RotaryEmbedding(rope_theta, d_model // num_heads, context_length, real)
        self.layers = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, rope, device, dtype) for _ in range(num_layers)
        )
        self.ln_final = RMSNorm(d_model, device=device, dtype=dtype)
        self.lm_head = Linear(d_model, vocab_size, device, dtype)

    def forward(self, token_ids: Tensor, caches: Sequence[KeyValueCache] | None = None, start: int = 0) -> Tensor:
        """Returns the logits of the next token at every position.

        Args:
            token_ids: `(batch, seq)` int64.
            caches: One key-value cache per layer, for sampling; see `new_caches`.
            start: Position of the first token: the number of tokens in the caches.

        Raises:
            ValueError: The sequence extends past the context length.
        """
        end = start + token_ids.shape[-1]
        if end > self.context_length:
            raise ValueError(f"a sequence of {end} tokens does not fit the context of {self.context_length}")
        positions = torch.arange(start, end, device=token_ids.device)
        x = self.token_embeddings(token_ids)
        for index, layer in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, positions, use_reentrant=False)
            else:
                x = layer(x, positions, caches[index] if caches is not None else None)
        return self.lm_head(self.ln_final(x))

    def new_caches(self) -> list[KeyValueCache]:
        """Returns empty key-value caches, one per layer."""
        return [KeyValueCache() for _ in self.layers]
