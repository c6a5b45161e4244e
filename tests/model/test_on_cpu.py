"""What is computed in another way on a CPU is as close to float64 as what PyTorch computes there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model import chunked_loss, on_cpu
from pipeline.model.attention import grouped_query_attention
from pipeline.model.chunked_loss import linear_cross_entropy
from pipeline.model.on_cpu import SHORT_CONTEXT, bfloat16_factors, linear, onednn_linear, rms_norm

EPS = 1e-5


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def errors(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], exact: Callable[..., Tensor]) -> list[float]:
    """Returns the relative distances of the result and of each gradient to those in float64."""
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    result, expected = call(*inputs), exact(*wide)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(9)).to(result.dtype)
    found = torch.autograd.grad(result, inputs, upstream)
    correct = torch.autograd.grad(expected, wide, upstream.double())
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(found, inputs, strict=True))
    return [error(a, b) for a, b in zip((result, *found), (expected, *correct), strict=True)]


@pytest.mark.parametrize("shape", [(3, 7, 96), (5, 300), (1, 1, 8)])
def test_gradients_of_the_norm_are_those_of_its_formula(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, gain: rms_norm(x, gain, EPS, torch.float64), (x, gain))
    expected = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain
    torch.testing.assert_close(rms_norm(x, gain, EPS, torch.float64), expected)


@pytest.mark.parametrize(
    ("of_x", "of_gain", "out", "bound"),
    [
        (torch.float32, torch.float32, torch.float32, 5e-7),
        (torch.float32, torch.float32, torch.bfloat16, 3e-3),  # under autocast
        (torch.bfloat16, torch.float32, torch.bfloat16, 3e-3),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, 3e-3),
    ],
)
def test_the_norm_is_computed_in_float32_and_rounded_once(of_x, of_gain, out, bound):
    generator = torch.Generator().manual_seed(3)
    x = (100 * torch.randn(4, 50, 96, generator=generator)).to(of_x).transpose(0, 1).requires_grad_()
    gain = (1 + torch.randn(96, generator=generator)).to(of_gain).requires_grad_()
    found = errors(
        lambda x, gain: rms_norm(x, gain, EPS, out),
        (x, gain),
        lambda x, gain: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gain,
    )
    assert max(found) < bound


@pytest.mark.parametrize("shape", [(96,), (1, 96), (50, 96), (3, 7, 96)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_map_by_onednn_is_as_close_to_float64_as_pytorchs(shape, biased, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    made = [torch.randn(size, generator=generator) for size in (shape, (40, 96), (40,))][: 2 + biased]
    inputs = tuple(t.requires_grad_() for t in made)
    theirs = errors(F.linear, inputs, F.linear)
    called = []
    monkeypatch.setattr(on_cpu, "onednn_linear", lambda *parts: called.append(1) or onednn_linear(*parts))
    for onednn in (True, False):
        monkeypatch.setattr(on_cpu, "MULTIPLY_BY_ONEDNN", onednn)
        ours = errors(lambda x, weight, bias=None: linear(x, weight, bias), inputs, F.linear)
        assert all(a <= 1.5 * b + 1e-7 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)
        assert called, "the first time by oneDNN"


def test_onednn_multiplies_float32_only(monkeypatch):
    monkeypatch.setattr(on_cpu, "MULTIPLY_BY_ONEDNN", True)
    monkeypatch.setattr(on_cpu, "onednn_linear", None)
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    assert linear(x.double(), weight.double(), None).dtype == torch.float64
    assert linear(x.bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16


def heads(tokens: int, count: int, kv_count: int) -> tuple[Tensor, ...]:
    """Returns q, k and v in bfloat16, laid out as projections leave them."""
    generator = torch.Generator().manual_seed(tokens)
    made = (torch.randn(2, tokens, n * 24, generator=generator) for n in (count, kv_count, kv_count))
    return tuple(t.bfloat16().unflatten(-1, (-1, 24)).transpose(1, 2).requires_grad_() for t in made)


@pytest.mark.parametrize(("count", "kv_count"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [2, 33, SHORT_CONTEXT])
def test_short_attention_is_as_close_to_float64_as_pytorchs(tokens, count, kv_count):
    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    ours = errors(lambda q, k, v: grouped_query_attention(q, k, v, True), heads(tokens, count, kv_count), exact)
    theirs = errors(exact, heads(tokens, count, kv_count), exact)
    assert all(a <= 1.6 * b + 1e-3 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_autocast_rounds_no_scores():
    inputs = heads(33, 4, 2)
    expected = grouped_query_attention(*inputs, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = grouped_query_attention(*inputs, True)
    assert torch.equal(found, expected)
    upstream = torch.ones_like(found)
    gradients = (torch.autograd.grad(heads, inputs, upstream) for heads in (found, expected))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_only_short_attention_of_bfloat16_that_is_trained_is_ours():
    ours = "_ShortCausalAttentionBackward"
    q, k, v = heads(16, 2, 2)
    assert grouped_query_attention(q, k, v, True).grad_fn.name() == ours
    assert grouped_query_attention(q, k, v, False).grad_fn.name() != ours
    assert grouped_query_attention(q.float(), k.float(), v.float(), True).grad_fn.name() != ours
    assert grouped_query_attention(*heads(SHORT_CONTEXT + 1, 2, 2), True).grad_fn.name() != ours
    with torch.no_grad():
        assert grouped_query_attention(q, k, v, True).grad_fn is None


def test_products_with_rounded_factors_are_not_rounded_themselves():
    a, b = torch.randn(64, 200).bfloat16(), torch.randn(200, 64).bfloat16()
    with bfloat16_factors():
        product = a.float() @ b.float()
    assert error(product, a.double() @ b.double()) < 1e-6
    assert error(a @ b, a.double() @ b.double()) > 1e-3


def test_the_setting_ends_with_its_block_and_with_an_error():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), bfloat16_factors():
        assert matmul.fp32_precision == "bf16"
        _ = 1 / 0
    assert matmul.fp32_precision == before != "bf16"


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_same_however_many_rows_a_cache_takes(dtype, z_loss, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(70, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(211, 24, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(-1, 211, (70,), generator=generator)

    def found(rows: int) -> list[Tensor]:
        monkeypatch.setattr(on_cpu, "CACHED_ELEMENTS", rows * 211)
        monkeypatch.setattr(chunked_loss, "_FEWEST_ROWS", 1)
        parts = linear_cross_entropy(x, weight, targets, 50, z_loss)
        return [parts.loss, parts.cross_entropy, *torch.autograd.grad(parts.loss, (x, weight))]

    whole = found(1000)
    for rows in (1, 7, 32):
        assert all(torch.equal(a, b) for a, b in zip(found(rows), whole, strict=True))
