"""Clipping equals PyTorch's, and its norm is exact."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.optim.clipping import clip_divisor, clip_gradients, scale_to_norm, squared_norm


def gradients() -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros(s)) for s in ((5, 5), (3,), (2, 2))]
    for i, p in enumerate(params[:2]):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return params  # the last has no gradient


@pytest.mark.parametrize("max_norm", [1e-2, 1e6])
def test_clipping_equals_pytorchs(max_norm):
    ours, theirs = gradients(), gradients()
    norm = clip_gradients(ours, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_eps_keeps_the_scale_finite_for_tiny_gradients():
    (tiny,) = params = [torch.nn.Parameter(torch.zeros(2))]
    tiny.grad = torch.tensor([3e-6, 0.0])
    clip_gradients(params, 1e-6, eps=1e-6)
    torch.testing.assert_close(tiny.grad, torch.tensor([0.75e-6, 0.0]), rtol=1e-5, atol=0)


def test_clipping_changes_no_bit_of_small_gradients():
    params = gradients()
    before = [p.grad.clone() for p in params[:2]]
    clip_gradients(params, 1e6)
    assert all(torch.equal(p.grad, b) for p, b in zip(params[:2], before, strict=True))


def test_the_norm_is_zero_without_gradients_and_nan_with_a_nan():
    assert clip_gradients([], 1.0) == 0
    params = gradients()
    params[0].grad[0, 0] = math.nan
    assert math.isnan(clip_gradients(params, 1.0))


def test_the_norm_of_a_large_flat_gradient_is_exact():
    """ZeRO on a CPU passes all of a rank's gradients in one tensor."""
    flat = torch.randn(20_000_000, generator=torch.Generator().manual_seed(0))
    exact = sum(float(part.double().square().sum()) for part in flat.split(1 << 20))
    assert float(squared_norm([flat])) == pytest.approx(exact, rel=1e-6)


def test_the_norm_of_bfloat16_gradients_is_computed_in_float32():
    """In bfloat16 it would be 1024.0."""
    grad = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul(0.9986).bfloat16()
    exact = float(grad.double().norm())
    assert abs(exact - 1024) > 1
    norm = squared_norm([grad, grad[:0]]).sqrt()
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-5)


def test_the_divisor_clips_as_the_scale_does():
    for norm, max_norm in ((10.0, 1.0), (0.5, 1.0), (1e-6, 1e-6)):
        grad = torch.tensor([0.3, -4.0])
        divided = grad / clip_divisor(torch.tensor(norm), max_norm)
        scale_to_norm([grad], torch.tensor(norm), max_norm)
        torch.testing.assert_close(divided, grad, rtol=3e-7, atol=0)
