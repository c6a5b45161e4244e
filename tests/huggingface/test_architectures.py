"""Our model under Hugging Face's names is Hugging Face's model, for every architecture and in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config.model_section import ModelConfig
from pipeline.errors import UsageError
from pipeline.huggingface.architectures import architecture_of, is_rotated, shapes, their_name, to_halves, to_pairs
from pipeline.huggingface.open_weights import OpenWeights
from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM
from tests.huggingface.folders import SHAPES, described, saved_by_transformers
from tests.model.test_transformer import SHAPE, every_variant


def read(folder: Path, model: ModelConfig) -> TransformerLM:
    """Our model with the weights of a folder."""
    ours, weights = TransformerLM(**model.model_dump()), OpenWeights(folder, model)
    for name, parameter in ours.named_parameters():
        weights.read("weight", name, 0, parameter.detach().view(-1))
    return ours.eval()


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TransformerLM]:
    """A model of transformers, and ours with the weights that it saved."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = saved_by_transformers(folder, request.param)
    return theirs, read(folder, described(folder))


@pytest.mark.slow
def test_logits_equal_those_of_transformers_with_a_cache_too(pair: tuple[Any, TransformerLM]) -> None:
    theirs, ours = pair
    ids = torch.randint(0, 260, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-5)
        caches = ours.new_caches()
        parts = [ours(ids[:, :50], caches)] + [ours(ids[:, i : i + 1], caches, start=i) for i in range(50, 64)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_all_gradients_equal_those_of_transformers(pair: tuple[Any, TransformerLM]) -> None:
    theirs, ours = pair
    ids = torch.randint(0, 260, (2, 33), generator=torch.Generator().manual_seed(1))
    cross_entropy(ours(ids[:, :-1]), ids[:, 1:]).backward()
    logits = theirs(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = to_halves(parameter.grad, ours.layers[0].attn.head_dim) if is_rotated(name) else parameter.grad
        torch.testing.assert_close(gradient, expected[their_name(name)], rtol=1e-4, atol=1e-5, msg=name)


@every_variant
def test_the_table_has_the_name_and_the_shape_of_every_parameter(variant: dict[str, Any]) -> None:
    model = ModelConfig(**SHAPE, **variant)
    ours = {name: tuple(weight.shape) for name, weight in TransformerLM(**model.model_dump()).state_dict().items()}
    assert dict(shapes(model)) == ours
    assert len({their_name(name) for name in ours}) == len(ours)


def test_names_are_those_of_transformers_and_an_unknown_one_has_none() -> None:
    assert their_name("layers.2.attn.output_proj.weight") == "model.layers.2.self_attn.o_proj.weight"
    assert their_name("layers.11.attn.k_proj.bias") == "model.layers.11.self_attn.k_proj.bias"
    assert their_name("lm_head.weight") == "lm_head.weight"
    with pytest.raises(KeyError):
        their_name("layers.2.attn.sink.weight")


def test_only_rows_of_queries_and_keys_change_places_from_pairs_to_halves_and_back() -> None:
    rows = torch.arange(8.0).unsqueeze(1)  # two heads of four
    assert to_halves(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(to_pairs(to_halves(rows, 4), 4), rows)
    rotated = {name.split(".", 3)[-1] for name, _ in shapes(QWEN) if is_rotated(name)}
    assert rotated == {f"{p}_{part}" for p in "qk" for part in ("proj.weight", "proj.bias", "norm.weight")}


QWEN = ModelConfig(**SHAPE, qkv_bias=True, qk_norm=True)


def test_a_model_of_no_architecture_cannot_be_written() -> None:
    assert architecture_of(ModelConfig(**SHAPE)).name == "LlamaForCausalLM"
    assert architecture_of(ModelConfig(**SHAPE, qkv_bias=True)).name == "Qwen2ForCausalLM"
    assert architecture_of(ModelConfig(**SHAPE, qk_norm=True)).name == "Qwen3ForCausalLM"
    with pytest.raises(UsageError, match=r"qkv_bias.*--format safetensors"):
        architecture_of(QWEN)
