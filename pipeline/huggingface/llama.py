"""The Llama architecture, which is this transformer under other names: weights, order of rows, config.json."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.config.model_section import ModelConfig
from pipeline.model.layers import NORM_EPS


class _Weight(NamedTuple):
    ours: str
    """Name in our state dict; `{i}` is the number of the layer."""
    theirs: str
    """Name in Hugging Face's state dict."""
    rotated: bool = False
    """Whether RoPE rotates these rows: ours in adjacent pairs (2k, 2k + 1), Llama's in halves (k, k + d/2)."""


_WEIGHTS = (
    _Weight("token_embeddings.weight", "model.embed_tokens.weight"),
    _Weight("layers.{i}.ln1.weight", "model.layers.{i}.input_layernorm.weight"),
    _Weight("layers.{i}.attn.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight", rotated=True),
    _Weight("layers.{i}.attn.k_proj.weight", "model.layers.{i}.self_attn.k_proj.weight", rotated=True),
    _Weight("layers.{i}.attn.v_proj.weight", "model.layers.{i}.self_attn.v_proj.weight"),
    _Weight("layers.{i}.attn.output_proj.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    _Weight("layers.{i}.ln2.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    _Weight("layers.{i}.ffn.w1.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    _Weight("layers.{i}.ffn.w2.weight", "model.layers.{i}.mlp.down_proj.weight"),
    _Weight("layers.{i}.ffn.w3.weight", "model.layers.{i}.mlp.up_proj.weight"),
    _Weight("ln_final.weight", "model.norm.weight"),
    _Weight("lm_head.weight", "lm_head.weight"),
)
_BY_OUR_NAME = {weight.ours: weight for weight in _WEIGHTS}
_LAYER = re.compile(r"(?<=^layers\.)\d+")


def llama_name(name: str) -> str:
    """Returns Hugging Face's name of one of our parameters."""
    layer = _LAYER.search(name)
    theirs = _row(name).theirs
    return theirs.replace("{i}", layer[0]) if layer else theirs


def llama_rows(name: str, weight: Tensor, num_heads: int) -> Tensor:
    """Returns one of our parameters with its rows in Llama's order."""
    if not _row(name).rotated:
        return weight
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _row(name: str) -> _Weight:
    return _BY_OUR_NAME[_LAYER.sub("{i}", name)]


def llama_config(model: ModelConfig, end_of_text_id: int) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "head_dim": model.d_model // model.num_heads,
        "max_position_embeddings": model.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": NORM_EPS,
        # Under both names: transformers 5 reads the second, older versions the first.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": end_of_text_id,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
