"""Counts of a model's parameters and floating-point operations, for MFU and for plans."""

from __future__ import annotations


def num_parameters(vocab_size: int, d_model: int, num_layers: int, d_ff: int) -> int:
    """Returns the number of parameters of `TransformerLM`, the embedding and the untied head included."""
    block = 4 * d_model * d_model + 3 * d_model * d_ff + 2 * d_model
    return 2 * vocab_size * d_model + num_layers * block + d_model


def flops_per_token(vocab_size: int, context_length: int, d_model: int, num_layers: int, d_ff: int) -> int:
    """Returns the floating-point operations of forward and backward per trained token.

    Six per weight that multiplies an activation (the embedding is a look-up and does not count) plus
    12 x layers x d_model x context for the attention scores and their use (Chowdhery et al. 2022,
    appendix B; the causal half is not subtracted, as is usual for MFU). Recomputation does not count.
    """
    multiplied = num_layers * (4 * d_model * d_model + 3 * d_model * d_ff) + vocab_size * d_model
    return 6 * multiplied + 12 * num_layers * d_model * context_length
