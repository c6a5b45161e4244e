"""Our model under Hugging Face's names is Hugging Face's Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.model_section import ModelConfig
from pipeline.huggingface.llama import llama_config, llama_name, llama_rows
from pipeline.model.layers import RMSNorm
from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM

CONFIG = ModelConfig(vocab_size=97, context_length=32, d_model=48, num_layers=3, num_heads=4, d_ff=64)


def small_model() -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(**CONFIG.model_dump())


def converted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {llama_name(name): llama_rows(name, weight, CONFIG.num_heads) for name, weight in weights.items()}


def llama(model: TransformerLM) -> Any:
    """Hugging Face's model of this shape with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**llama_config(CONFIG, end_of_text_id=0)))
    theirs.load_state_dict(converted(model.state_dict()))
    return theirs


@pytest.mark.slow
def test_logits_and_all_gradients_equal_those_of_hugging_face_llama() -> None:
    model = small_model()
    llama_model = llama(model)
    ids = torch.randint(0, 97, (3, 32))
    ours, theirs = model(ids[:, :-1]), llama_model(ids[:, :-1]).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    cross_entropy(ours, ids[:, 1:]).backward()
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in llama_model.named_parameters()}
    for name, gradient in converted({n: p.grad for n, p in model.named_parameters()}).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_every_parameter_has_a_name_of_its_own_in_llama() -> None:
    names = [llama_name(name) for name in small_model().state_dict()]
    assert len(set(names)) == len(names)
    assert llama_name("layers.2.attn.output_proj.weight") == "model.layers.2.self_attn.o_proj.weight"
    assert llama_name("lm_head.weight") == "lm_head.weight"
    with pytest.raises(KeyError):
        llama_name("layers.2.attn.sink.weight")


def test_only_rows_of_queries_and_keys_change_places_from_pairs_to_halves() -> None:
    rows = torch.arange(8.0).unsqueeze(1)  # two heads of four
    halves, pairs = [0, 2, 1, 3, 4, 6, 5, 7], list(range(8))
    for projection, expected in (("q", halves), ("k", halves), ("v", pairs)):
        name = f"layers.0.attn.{projection}_proj.weight"
        assert llama_rows(name, rows, num_heads=2).flatten().tolist() == expected


def test_the_config_has_the_shape_and_the_constants_of_the_model() -> None:
    model, config = small_model(), llama_config(CONFIG, end_of_text_id=5)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
    assert {norm.eps for norm in norms} == {config["rms_norm_eps"]}
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"] == 48
    assert (config["vocab_size"], config["intermediate_size"], config["num_hidden_layers"]) == (97, 64, 3)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == CONFIG.rope_theta
    assert config["tie_word_embeddings"] is config["attention_bias"] is config["mlp_bias"] is False
    assert config["eos_token_id"] == 5
