"""The architectures that are read and written, and the names of their weights: one table for both directions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.model_section import ModelConfig
from pipeline.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


class Architecture(NamedTuple):
    """One of Hugging Face's classes."""

    name: str
    """The class."""
    model_type: str
    """Its name in config.json."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    qk_norm: bool = False
    """Whether each head's queries and keys are normalized."""
    required: tuple[str, ...] = ()
    """Fields of config.json whose default in transformers is a fixed number, so that their absence tells nothing."""


ARCHITECTURES = (
    Architecture("LlamaForCausalLM", "llama"),
    Architecture("MistralForCausalLM", "mistral", required=("num_key_value_heads",)),
    Architecture("Qwen2ForCausalLM", "qwen2", qkv_bias=True, required=("num_key_value_heads",)),
    Architecture("Qwen3ForCausalLM", "qwen3", qk_norm=True, required=("num_key_value_heads", "head_dim")),
)


def architecture_of(model: ModelConfig) -> Architecture:
    """Returns the first architecture that computes what this model computes.

    Raises:
        UsageError: There is none.
    """
    for found in ARCHITECTURES:
        if (found.qkv_bias, found.qk_norm) == (model.qkv_bias, model.qk_norm):
            return found
    names = ", ".join(found.name for found in ARCHITECTURES)
    raise UsageError(
        f"model.qkv_bias with model.qk_norm is none of the architectures {names}; use --format safetensors"
    )


class Weight(NamedTuple):
    """One kind of parameter."""

    ours: str
    """Name in our state dict; `{i}` is the number of the layer."""
    theirs: str
    """Name in Hugging Face's state dict."""
    rotated: bool = False
    """Whether RoPE rotates these rows: ours in adjacent pairs (2k, 2k + 1), theirs in halves (k, k + d/2)."""


_ATTN, _SELF_ATTN = "layers.{i}.attn", "model.layers.{i}.self_attn"
_WEIGHTS = (
    Weight("token_embeddings.weight", "model.embed_tokens.weight"),
    Weight("layers.{i}.ln1.weight", "model.layers.{i}.input_layernorm.weight"),
    *(Weight(f"{_ATTN}.{p}_proj.weight", f"{_SELF_ATTN}.{p}_proj.weight", rotated=p in "qk") for p in "qkv"),
    *(Weight(f"{_ATTN}.{p}_proj.bias", f"{_SELF_ATTN}.{p}_proj.bias", rotated=p in "qk") for p in "qkv"),
    *(Weight(f"{_ATTN}.{p}_norm.weight", f"{_SELF_ATTN}.{p}_norm.weight", rotated=True) for p in "qk"),
    Weight("layers.{i}.attn.output_proj.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Weight("layers.{i}.ln2.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Weight("layers.{i}.ffn.w1.weight", "model.layers.{i}.mlp.gate_proj.weight"),
    Weight("layers.{i}.ffn.w2.weight", "model.layers.{i}.mlp.down_proj.weight"),
    Weight("layers.{i}.ffn.w3.weight", "model.layers.{i}.mlp.up_proj.weight"),
    Weight("ln_final.weight", "model.norm.weight"),
    Weight("lm_head.weight", "lm_head.weight"),
)
_BY_OUR_NAME = {weight.ours: weight for weight in _WEIGHTS}
_LAYER = re.compile(r"(?<=^layers\.)\d+")


def their_name(name: str) -> str:
    """Returns Hugging Face's name of one of our parameters."""
    layer = _LAYER.search(name)
    theirs = _row(name).theirs
    return theirs.replace("{i}", layer[0]) if layer else theirs


def is_rotated(name: str) -> bool:
    """Whether the rows of one of our parameters are in another order in Hugging Face's format."""
    return _row(name).rotated


def to_halves(weight: Tensor, head_dim: int) -> Tensor:
    """Returns rows of whole heads, which are rotated in adjacent pairs, in the order of halves."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def to_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Returns rows of whole heads, which are rotated in halves, in the order of adjacent pairs."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def shapes(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields our name and the shape of every parameter of a model."""
    d, q, kv, ff = model.d_model, model.d_q, model.d_kv, model.d_ff
    yield "token_embeddings.weight", (model.vocab_size, d)
    for i in range(model.num_layers):
        block: dict[str, tuple[int, ...]] = {
            "ln1.weight": (d,), "attn.q_proj.weight": (q, d), "attn.k_proj.weight": (kv, d),
            "attn.v_proj.weight": (kv, d), "attn.output_proj.weight": (d, q), "ln2.weight": (d,),
            "ffn.w1.weight": (ff, d), "ffn.w2.weight": (d, ff), "ffn.w3.weight": (ff, d),
        }  # fmt: skip
        if model.qkv_bias:
            block |= {"attn.q_proj.bias": (q,), "attn.k_proj.bias": (kv,), "attn.v_proj.bias": (kv,)}
        if model.qk_norm:
            block |= {"attn.q_norm.weight": (model.head_size,), "attn.k_norm.weight": (model.head_size,)}
        yield from ((f"layers.{i}.{name}", shape) for name, shape in block.items())
    yield "ln_final.weight", (d,)
    if not model.tie_embeddings:
        yield "lm_head.weight", (model.vocab_size, d)


def _row(name: str) -> Weight:
    return _BY_OUR_NAME[_LAYER.sub("{i}", name)]


def other_tensors(
    expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], described_by: str
) -> list[str]:
    """Returns how the names and shapes of stored tensors differ from those of a model: at most nine lines.

    Args:
        expected: The shapes that the model gives its parameters, by name.
        found: The stored ones.
        described_by: What describes the model, for the lines.
    """
    problems = [f"{name}: is missing" for name in expected if name not in found]
    problems += [f"{name}: is not part of the model" for name in found if name not in expected]
    problems += [
        f"{name}: has the shape {list(found[name])}, {described_by} gives it {list(shape)}"
        for name, shape in expected.items()
        if list(found.get(name, shape)) != list(shape)
    ]
    return problems if len(problems) <= 8 else [*problems[:8], f"and {len(problems) - 8} more"]
