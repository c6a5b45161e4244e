"""config.json says the same in both directions, and what this model cannot compute is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.model_section import ModelConfig
from pipeline.errors import UsageError
from pipeline.huggingface.config_json import config_json, model_section
from tests.model.test_transformer import SHAPE, every_variant

SCALED = {"kind": "llama3", "factor": 8.0, "original_context_length": 16}


def tree(**changes: Any) -> dict[str, Any]:
    return {**config_json(ModelConfig(**SHAPE), 5, "float32"), **changes}


def resolved(model: ModelConfig) -> dict[str, Any]:
    return {**model.model_dump(), "num_kv_heads": model.kv_heads, "head_dim": model.head_size}


@every_variant
@pytest.mark.parametrize("scaling", [None, SCALED])
def test_what_is_written_is_read_back(variant: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    model = ModelConfig(**SHAPE, rope_theta=5e5, **{"rope_scaling": scaling, **variant})
    assert resolved(model_section(config_json(model, 5, "float32"), "config.json")) == resolved(model)


def test_older_and_newer_spellings_of_the_position_embedding_are_read() -> None:
    old = tree(rope_theta=7.0, rope_scaling={"type": "linear", "factor": 2.0})
    del old["rope_parameters"]
    found = model_section(old, "config.json")
    assert (found.rope_theta, found.rope_scaling.factor) == (7.0, 2.0)  # type: ignore[union-attr]
    new = tree(rope_parameters={"rope_type": "default", "rope_theta": 9.0})
    assert model_section(new, "config.json").rope_theta == 9.0


def test_what_old_folders_leave_out_has_the_values_of_transformers() -> None:
    old = tree()
    for key in ("rms_norm_eps", "num_key_value_heads", "head_dim", "tie_word_embeddings"):
        del old[key]
    found = model_section(old, "config.json")
    assert (found.norm_eps, found.kv_heads, found.head_size, found.tie_embeddings) == (1e-6, 4, 12, False)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "Qwen2ForCausalLM"),
        ({"architectures": None}, "LlamaForCausalLM"),
        ({"model_type": "phi3"}, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_experts": 8}, "num_experts"),
        ({"attention_multiplier": 0.5}, "attention_multiplier"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.5}}, "attention_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": 3}, "layer_types"),
        ({"rope_scaling": 3}, "rope_scaling"),
        ({"rope_theta": "large", "rope_parameters": None}, "rope_theta"),
        ({"max_position_embeddings": "long", "sliding_window": 4, "use_sliding_window": True}, "sliding_window"),
        ({"sliding_window": 16, "use_sliding_window": True}, "sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16,
          "use_sliding_window": None}, "sliding_window"),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 8192},
         "sliding_window: is missing, which means 4096"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 8192,
          "use_sliding_window": True}, "sliding_window"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"num_hidden_layers": "two"}, "num_layers"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": None}, "head_dim"),
    ],
)  # fmt: skip
def test_what_changes_the_numbers_is_refused_by_name(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=rf"(?s)^FOLDER/config.json: .*{word}"):
        model_section(tree(**changes), "FOLDER/config.json")


def test_a_window_that_is_not_used_or_not_shorter_than_the_context_is_allowed() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "sliding_window": 4}
    assert model_section(tree(**qwen, use_sliding_window=False), "config.json").qkv_bias
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    window = {"sliding_window": SHAPE["context_length"], "use_sliding_window": None}
    assert model_section(tree(**mistral, **window), "config.json").d_model == 48
    long = {**mistral, "max_position_embeddings": 8192}
    assert model_section(tree(**long, sliding_window=None), "config.json").d_model == 48
    assert model_section(tree(**mistral), "config.json").d_model == 48


@pytest.mark.parametrize("content", [[], "text", None, 3, {}])
def test_what_is_no_config_is_refused(content: Any) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        model_section(content, "config.json")
