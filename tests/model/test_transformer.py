"""The whole model: its names, its cache and its switches. tests/huggingface compares it with Hugging Face's Llama."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM, recomputed

SHAPE = {"vocab_size": 97, "context_length": 32, "d_model": 48, "num_layers": 3, "num_heads": 4, "d_ff": 64}


def small_model(seed: int = 0) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(**SHAPE, rope_theta=10000.0)


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


def test_the_key_value_cache_gives_the_logits_of_the_whole_sequence():
    model = small_model()
    ids = torch.randint(0, 97, (2, 20))
    caches = model.new_caches()
    parts = [model(ids[:, :7], caches)] + [model(ids[:, i : i + 1], caches, start=i) for i in range(7, 20)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recomputed", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit_of_loss_or_gradients(recomputed):
    ids = torch.randint(0, 97, (2, 33))
    losses, gradients = [], []
    for mode in ("none", recomputed):
        model = small_model()
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
    names = ("_scaled_dot_product_flash_attention_for_cpu", "silu", "mm")
    attention, silu, products = (calls.names.count(name) for name in names)
    assert attention == 3 * repeated
    assert silu == (0 if mode == "none" else 3)
    # Per block: seven matrices, each with two products in backward. No gradient needs the result of the last one, which
    # only DeepSpeed's linear repeats; an engine of stage 3 leaves that behind in its process.
    assert products - 3 * 14 in ({3 * 6, 3 * 7} if repeated else {0})


@pytest.mark.parametrize(("mode", "products"), [("full", 14 + 6), ("selective", 14)])
def test_a_compiled_block_is_one_graph_that_keeps_what_checkpointing_keeps(mode, products):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    model, ids = small_model(), torch.randint(0, 97, (2, 33))
    plain = torch.autograd.grad(model(ids[:, :-1], targets=ids[:, 1:]).loss, list(model.parameters()))
    for layer in model.layers:
        layer.forward = torch.compile(recomputed(layer.forward, mode), backend=counter, fullgraph=True)
    loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        compiled = torch.autograd.grad(loss, list(model.parameters()))
    assert counter.frame_count == 1  # the blocks share it
    names = [event.name for event in profiler.events()]
    assert names.count("aten::mm") == 3 * products
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


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


def test_a_sequence_longer_than_the_context_is_rejected():
    with pytest.raises(ValueError, match="context of 32"):
        small_model()(torch.zeros(1, 33, dtype=torch.int64))
