"""Cross-entropy and its gradient equal PyTorch's in any shape, size of logits and dtype."""

from __future__ import annotations

import pytest
import torch

from pipeline.model.loss import cross_entropy


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_cross_entropy_equals_torch_in_any_shape_and_size_of_logits(shape, scale):
    logits = (torch.randn(shape) * scale).requires_grad_()
    targets = torch.randint(0, 7, shape[:-1])
    other = logits.detach().clone().requires_grad_()
    loss = cross_entropy(logits, targets)
    expected = torch.nn.functional.cross_entropy(other.reshape(-1, 7), targets.reshape(-1))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, other.grad)


def test_the_gradient_of_cross_entropy_equals_finite_differences_and_can_be_taken_twice():
    logits = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (3, 2))
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (logits,))
    loss = cross_entropy(logits, targets)
    twice = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*twice)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits = torch.randn(5, 300, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 300, (5,))
    loss = cross_entropy(logits, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16
    assert torch.equal(loss.detach(), cross_entropy(logits.detach().float(), targets))
