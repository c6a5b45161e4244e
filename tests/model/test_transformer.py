"""The whole model: its names, its cache and its switches. tests/huggingface compares it with Hugging Face's Llama."""

from __future__ import annotations

import pytest
import torch

from pipeline.model.loss import cross_entropy
from pipeline.model.transformer import TransformerLM

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


def test_activation_checkpointing_changes_no_bit_of_loss_or_gradients():
    ids = torch.randint(0, 97, (2, 33))
    losses, gradients = [], []
    for switched_on in (False, True):
        model = small_model()
        model.activation_checkpointing = switched_on
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_sequence_longer_than_the_context_is_rejected():
    with pytest.raises(ValueError, match="context of 32"):
        small_model()(torch.zeros(1, 33, dtype=torch.int64))
