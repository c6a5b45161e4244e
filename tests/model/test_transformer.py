"""The whole model: its names, its cache and its switches. tests/huggingface compares it with Hugging Face's Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM, recomputed

SHAPE = {"vocab_size": 97, "context_length": 32, "d_model": 48, "num_layers": 3, "num_heads": 4, "d_ff": 64}
VARIANTS = {
    "grouped": {"num_kv_heads": 2, "head_dim": 20},
    "tied": {"tie_embeddings": True, "norm_eps": 1e-6},
    "biased": {"num_kv_heads": 1, "qkv_bias": True, "rope_scaling": {"kind": "linear", "factor": 2.0}},
    "normed": {"num_kv_heads": 2, "qk_norm": True, "tie_embeddings": True},
}
every_variant = pytest.mark.parametrize("variant", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])


def small_model(seed: int = 0, **variant: Any) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(**SHAPE, rope_theta=10000.0, **variant)


def test_state_dict_has_the_names_of_the_design():
    names = set(small_model().state_dict())
    layer = {
        "ln1.weight", "attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight", "attn.output_proj.weight",
        "ln2.weight", "ffn.w1.weight", "ffn.w2.weight", "ffn.w3.weight",
    }  # fmt: skip
    expected = {f"layers.{i}.{n}" for i in range(3) for n in layer}
    assert names == expected | {"token_embeddings.weight", "ln_final.weight", "lm_head.weight"}


def test_logits_of_a_prefix_do_not_depend_on_what_follows():
    model = small_model()
    ids = torch.randint(0, 97, (2, 32))
    torch.testing.assert_close(model(ids)[:, :9], model(ids[:, :9]), rtol=0, atol=1e-5)


def test_a_variant_adds_the_parameters_it_needs_and_a_tied_head_has_none():
    plain, variant = small_model(), small_model(num_kv_heads=2, qkv_bias=True, qk_norm=True, tie_embeddings=True)
    names = {f"{p}_proj.bias" for p in "qkv"} | {"q_norm.weight", "k_norm.weight"}
    assert set(variant.state_dict()) - set(plain.state_dict()) == {
        f"layers.{i}.attn.{n}" for i in range(3) for n in names
    }
    assert set(plain.state_dict()) - set(variant.state_dict()) == {"lm_head.weight"}
    assert variant.state_dict()["layers.0.attn.k_proj.weight"].shape == (24, 48)
    assert not variant.layers[0].attn.q_proj.bias.any()


def test_the_gradient_of_a_tied_weight_is_the_sum_of_both_of_its_uses():
    tied, ids = small_model(tie_embeddings=True), torch.randint(0, 97, (2, 33))
    untied = small_model()
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.token_embeddings.weight.detach()})
    for model in (tied, untied):
        model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    both = untied.token_embeddings.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.token_embeddings.weight.grad, both)


def test_heads_that_share_keys_equal_heads_with_copies_of_them():
    shared, copied = small_model(num_kv_heads=2), small_model()
    weights = shared.state_dict()
    for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
        weights[name] = weights[name].unflatten(0, (2, 12)).repeat_interleave(2, dim=0).flatten(0, 1)
    copied.load_state_dict(weights)
    ids = torch.randint(0, 97, (2, 32))
    torch.testing.assert_close(shared(ids), copied(ids), rtol=0, atol=1e-6)
    assert shared.new_caches()[0].keys is None
    caches = shared.new_caches()
    shared(ids, caches)
    assert caches[0].keys.shape == (2, 2, 32, 12), "the cache holds each shared head once"


@every_variant
def test_the_key_value_cache_gives_the_logits_of_the_whole_sequence(variant):
    model = small_model(**variant)
    ids = torch.randint(0, 97, (2, 20))
    caches = model.new_caches()
    parts = [model(ids[:, :7], caches)] + [model(ids[:, i : i + 1], caches, start=i) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-5)


@every_variant
@pytest.mark.parametrize("recomputed", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit_of_loss_or_gradients(recomputed, variant):
    ids = torch.randint(0, 97, (2, 33))
    losses, gradients = [], []
    for mode in ("none", recomputed):
        model = small_model(**variant)
        model.activation_checkpointing = mode
        loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class Calls(TorchDispatchMode):
    """Notes the operations that are computed, not those whose kept results are used."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "repeated"), [("none", 0), ("full", 1), ("selective", 0)])
def test_only_full_checkpointing_repeats_attention_and_matrix_products(mode, repeated):
    model = small_model()
    model.activation_checkpointing = mode
    loss = model(torch.randint(0, 97, (2, 32)), targets=torch.randint(0, 97, (2, 32))).loss
    with Calls() as calls:
        loss.backward()
    names = ("_scaled_dot_product_flash_attention_for_cpu", "silu", "mm", "onednn_linear")
    attention, silu, *products = (calls.names.count(name) for name in names)
    assert attention == 3 * repeated
    assert silu == (0 if mode == "none" else 3)
    # Per block: seven matrices, each with two products in backward. No gradient needs the result of the last one, which
    # only DeepSpeed's linear repeats; an engine of stage 3 leaves that behind in its process.
    assert sum(products) - 3 * 14 in ({3 * 6, 3 * 7} if repeated else {0})


@pytest.mark.parametrize(("mode", "products"), [("full", 14 + 6), ("selective", 14)])
@pytest.mark.parametrize("variant", [{}, VARIANTS["normed"]], ids=["plain", "normed"])
def test_a_compiled_block_is_one_graph_that_keeps_what_checkpointing_keeps(mode, products, variant):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    model, ids = small_model(**variant), torch.randint(0, 97, (2, 33))
    plain = torch.autograd.grad(model(ids[:, :-1], targets=ids[:, 1:]).loss, list(model.parameters()))
    for layer in model.layers:
        layer.forward = torch.compile(recomputed(layer.forward, mode), backend=counter, fullgraph=True)
    loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compiled = torch.autograd.grad(loss, list(model.parameters()))
    assert counter.frame_count == 1  # the blocks share it
    names = [event.name for event in profiler.events()]
    assert names.count("aten::mm") + names.count("pipeline::onednn_linear") == 3 * products
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_model_that_is_cast_to_bfloat16_gives_nearly_the_logits_of_float32():
    tokens = torch.randint(0, 97, (2, 32))
    with torch.no_grad():
        expected = small_model()(tokens)
        found = small_model().bfloat16()(tokens)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_the_model_returns_the_loss_of_its_logits():
    model, ids = small_model(), torch.randint(0, 97, (2, 33))
    model.loss_chunk_tokens = 10
    parts = model(ids[:, :-1], targets=ids[:, 1:])
    torch.testing.assert_close(parts.loss, cross_entropy(model(ids[:, :-1]), ids[:, 1:]))
    assert torch.equal(parts.loss, parts.cross_entropy)
    model.z_loss = 1e-2
    parts = model(ids[:, :-1], targets=ids[:, 1:])
    squares = model(ids[:, :-1]).logsumexp(-1).square().mean()
    torch.testing.assert_close(parts.loss - parts.cross_entropy, 1e-2 * squares)


def test_a_model_on_meta_draws_nothing_and_has_the_real_tables_of_the_positions():
    before = torch.get_rng_state()
    model = TransformerLM(**SHAPE, rope_theta=10000.0, device=torch.device("meta"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta for p in model.parameters())
    pairs = zip(model.named_buffers(), small_model().named_buffers(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_the_logits_of_a_part_are_those_of_the_whole():
    model = small_model()
    ids = torch.randint(0, 97, (2, 32))
    torch.testing.assert_close(model(ids, logits_from=20), model(ids)[:, 20:], rtol=0, atol=1e-5)


def test_a_sequence_longer_than_the_context_is_rejected():
    with pytest.raises(ValueError, match="context of 32"):
        small_model()(torch.zeros(1, 33, dtype=torch.int64))
