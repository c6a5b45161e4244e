"""The layers equal their definitions, written in another way."""

from __future__ import annotations

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.model.layers import (
    CausalSelfAttention,
    Embedding,
    KeyValueCache,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    scaled_dot_product_attention,
    softmax,
)

LAYOUTS = {
    "whole": lambda: torch.randn(2, 3, 5, 8),
    "heads split off": lambda: torch.randn(2, 5, 3, 8).transpose(1, 2),
    "at an odd place": lambda: torch.randn(2, 3, 5, 9)[..., 1:],
    "strided": lambda: torch.randn(2, 3, 5, 16)[..., ::2],
    "one value for all": lambda: torch.ones(()).expand(2, 3, 5, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_rotates_adjacent_pairs_and_its_gradient_rotates_back(layout):
    theta, positions = 10000.0, torch.tensor([0, 1, 7, 3, 2])
    x, upstream = LAYOUTS[layout](), LAYOUTS[layout]()
    angles = positions[:, None] * theta ** (-torch.arange(0, 8, 2) / 8).double()
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack((torch.stack((cos, -sin), -1), torch.stack((sin, cos), -1)), -2)  # 2 x 2 for each pair
    wide = x.double().requires_grad_()
    expected = torch.einsum("skij,bhskj->bhski", turns, wide.unflatten(-1, (-1, 2))).flatten(-2)
    x.requires_grad_()
    found = RotaryEmbedding(theta, 8, 16)(x, positions)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    gradients = torch.autograd.grad(found, x, upstream)[0], torch.autograd.grad(expected, wide, upstream.double())[0]
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=0, atol=1e-6)


def test_rope_takes_positions_per_sequence_across_heads():
    x = torch.randn(2, 3, 4, 6)
    rope = RotaryEmbedding(100.0, 6, 32)
    positions = torch.tensor([[0, 1, 2, 3], [9, 8, 7, 6]])
    each = torch.stack([rope(x[i], positions[i]) for i in range(2)])
    torch.testing.assert_close(rope(x, positions), each, rtol=0, atol=0)


def test_rope_at_a_slice_of_the_positions_gives_the_bits_of_single_positions_and_copies_no_table():
    rope = RotaryEmbedding(100.0, 6, 32)
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(rope(x, slice(5, 9)), rope(x, torch.arange(5, 9)))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        rope(x, slice(5, 9))
    assert not any(event.name == "aten::index" for event in profiler.events())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float64, 1e-7)]
)
def test_rope_keeps_the_type_of_what_it_rotates_and_its_own_tables(dtype: torch.dtype, tolerance: float):
    rope, positions = RotaryEmbedding(10000.0, 8, 4096), torch.tensor([4093, 4094, 4095])
    x = torch.randn(2, 3, 8).to(dtype)
    expected = rope(x.float(), positions)
    found = rope.to(dtype)(x, positions)
    assert found.dtype == dtype and rope.cos.dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_rope_is_that_of_float64():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: RotaryEmbedding(100.0, 8, 16)(x, torch.arange(3)), x)


def test_rope_rotates_an_empty_batch():
    positions = torch.zeros(0, 5, dtype=torch.int64)
    assert RotaryEmbedding(100.0, 8, 16)(torch.zeros(0, 2, 5, 8), positions).shape == (0, 2, 5, 8)


def test_rope_rejects_an_odd_head_size():
    with pytest.raises(ValueError, match="even"):
        RotaryEmbedding(10000.0, 7, 16)


@pytest.mark.parametrize("gain_dtype", [torch.bfloat16, torch.float32])
def test_rmsnorm_is_computed_in_float32_for_bfloat16_inputs(gain_dtype):
    norm = RMSNorm(64, dtype=gain_dtype)
    x = (torch.randn(4, 64) * 100).bfloat16()
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    result = norm(x)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), expected.bfloat16().double(), rtol=1 / 128, atol=0)


@pytest.mark.parametrize("compiling", [False, True], ids=["ours", "PyTorch's"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_is_as_close_to_float64_as_its_formula(dtype, compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)  # then, as on a GPU, PyTorch's kernel
    norm = RMSNorm(96, dtype=dtype)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    x, upstream = torch.randn(50, 96, dtype=dtype, requires_grad=True), torch.randn(50, 96, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    gain = norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt() * gain
    inputs = torch.autograd.grad(expected, (wide, gain), upstream.double())
    result = norm(x)
    found = torch.autograd.grad(result, (x, norm.weight), upstream)
    bound = 1e-6 if dtype == torch.float32 else 3e-3  # 2e-3 is the rounding of the results to bfloat16
    for a, b in zip((result, *found), (expected, *inputs), strict=True):
        assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < bound


def test_initial_weights_are_cut_at_three_standard_deviations():
    torch.manual_seed(0)
    linear, embedding = Linear(400, 200).weight, Embedding(500, 100).weight
    std = math.sqrt(2 / 600)
    assert linear.abs().max() <= 3 * std
    assert linear.std().item() == pytest.approx(std, rel=0.03)
    assert embedding.abs().max() <= 3
    assert embedding.std().item() == pytest.approx(1, rel=0.03)


def test_masked_attention_equals_an_explicit_softmax():
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4), torch.randn(2, 3, 6, 7)
    mask = torch.rand(5, 6) < 0.7
    mask[:, 0] = True
    scores = (q @ k.mT / math.sqrt(4)).masked_fill(~mask, float("-inf"))
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), softmax(scores, -1) @ v)


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    attention = CausalSelfAttention(16, 2, RotaryEmbedding(10000.0, 8, 32))
    x = torch.randn(1, 10, 16)
    changed = x.clone()
    changed[:, 6:] = torch.randn(1, 4, 16)
    positions = torch.arange(10)
    before, after = attention(x, positions), attention(changed, positions)
    torch.testing.assert_close(before[:, :6], after[:, :6], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


def test_a_filled_cache_rejects_a_chunk_it_could_not_mask():
    attention = CausalSelfAttention(16, 2)
    cache = KeyValueCache()
    attention(torch.randn(1, 3, 16), cache=cache)
    with pytest.raises(ValueError, match="one token"):
        attention(torch.randn(1, 2, 16), cache=cache)


def test_softmax_of_large_values_does_not_overflow():
    x = torch.randn(3, 5)
    torch.testing.assert_close(softmax(x + 1e4, 1), torch.softmax(x + 1e4, 1))
    assert softmax(torch.tensor([1e30, 0.0]), 0).tolist() == [1.0, 0.0]
