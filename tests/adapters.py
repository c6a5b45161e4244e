"""Thin adapters that expose each piece of the training loop under a fixed name, so that external tests can drive it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pipeline.checkpoint.single_file import load_checkpoint, save_checkpoint
from pipeline.data.dataset import get_batch
from pipeline.model import layers
from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM
from pipeline.optim.adamw import AdamW
from pipeline.optim.clipping import clip_gradients
from pipeline.optim.schedule import get_lr_cosine_schedule


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    """Applies a linear layer: `weights (d_out, d_in)`, `in_features (..., d_in)` -> `(..., d_out)`."""
    return _loaded(layers.Linear(d_in, d_out), {"weight": weights})(in_features)


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    """Looks tokens up: `weights (vocab_size, d_model)`, `token_ids (...)` -> `(..., d_model)`."""
    return _loaded(layers.Embedding(vocab_size, d_model), {"weight": weights})(token_ids)


def run_swiglu(
    d_model: int, d_ff: int, w1_weight: Tensor, w2_weight: Tensor, w3_weight: Tensor, in_features: Tensor
) -> Tensor:
    """Applies SwiGLU: `in_features (..., d_model)` -> `(..., d_model)`."""
    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return _loaded(layers.SwiGLU(d_model, d_ff), weights)(in_features)


def run_scaled_dot_product_attention(Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attends with `Q (..., queries, d_k)`, `K (..., keys, d_k)`, `V (..., keys, d_v)`; mask True = attend."""
    return layers.scaled_dot_product_attention(Q, K, V, mask)


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
) -> Tensor:
    """Applies causal attention without positions: `(..., seq, d_model)` -> the same shape."""
    attention = layers.CausalSelfAttention(d_model, num_heads)
    weights = _attention_weights(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    return _loaded(attention, weights)(in_features)


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
    token_positions: Tensor | None = None,
) -> Tensor:
    """Applies causal attention with RoPE; positions `(..., seq)`, by default 0 .. seq-1."""
    rope = layers.RotaryEmbedding(theta, d_model // num_heads, max_seq_len)
    attention = layers.CausalSelfAttention(d_model, num_heads, rope)
    weights = _attention_weights(q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    if token_positions is None:
        token_positions = torch.arange(in_features.shape[-2], device=in_features.device)
    return _loaded(attention, weights)(in_features, token_positions)


def run_rope(d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor) -> Tensor:
    """Rotates `(..., seq, d_k)` at `token_positions (..., seq)`."""
    return layers.RotaryEmbedding(theta, d_k, max_seq_len)(in_query_or_key, token_positions)


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: dict[str, Tensor],
    in_features: Tensor,
) -> Tensor:
    """Applies one pre-norm block; `weights` has the block's state-dict names."""
    rope = layers.RotaryEmbedding(theta, d_model // num_heads, max_seq_len)
    block = _loaded(layers.TransformerBlock(d_model, num_heads, d_ff, rope), weights)
    return block(in_features, torch.arange(in_features.shape[-2], device=in_features.device))


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: dict[str, Tensor],
    in_indices: Tensor,
) -> Tensor:
    """Runs the model: `in_indices (batch, seq)`, seq up to the context -> logits `(batch, seq, vocab)`."""
    model = TransformerLM(vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta)
    return _loaded(model, weights)(in_indices)


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    """Normalizes `(..., d_model)`."""
    return _loaded(layers.RMSNorm(d_model, eps), {"weight": weights})(in_features)


def run_silu(in_features: Tensor) -> Tensor:
    """Applies SiLU elementwise."""
    return layers.silu(in_features)


def run_softmax(in_features: Tensor, dim: int) -> Tensor:
    """Applies softmax along `dim`."""
    return layers.softmax(in_features, dim)


def run_get_batch(dataset: np.ndarray, batch_size: int, context_length: int, device: str) -> tuple[Tensor, Tensor]:
    """Draws windows at uniformly random starts of a 1-D token array: x and y `(batch_size, context_length)`."""
    return get_batch(dataset, batch_size, context_length, device)


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    """Returns the mean loss of `inputs (..., vocab)` on `targets (...)`."""
    return cross_entropy(inputs, targets)


def run_gradient_clipping(parameters: Iterable[torch.nn.Parameter], max_l2_norm: float) -> None:
    """Scales the gradients in place."""
    clip_gradients(parameters, max_l2_norm)


def get_adamw_cls() -> Any:
    """Returns the project's own optimizer class."""
    return AdamW


def run_get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """Returns the learning rate at step `it`."""
    return get_lr_cosine_schedule(it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters)


def run_save_checkpoint(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | BinaryIO | IO[bytes],
) -> None:
    """Saves both to a file or a binary file object."""
    save_checkpoint(model, optimizer, iteration, out)


def run_load_checkpoint(
    src: str | os.PathLike[str] | BinaryIO | IO[bytes], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Restores both and returns the iteration."""
    return load_checkpoint(src, model, optimizer)


def _attention_weights(q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> dict[str, Tensor]:
    return {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "output_proj.weight": o}


def _loaded(module: torch.nn.Module, weights: dict[str, Tensor]) -> torch.nn.Module:
    """Returns the module with these weights, device and dtype; refuses missing or surplus names."""
    first = next(iter(weights.values()))
    module.to(device=first.device, dtype=first.dtype)
    module.load_state_dict(weights)
    return module
