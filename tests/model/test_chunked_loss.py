"""The loss in chunks equals the loss of the whole logits, and never holds more than a chunk of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model import chunked_loss, on_cpu
from pipeline.model.chunked_loss import IGNORED, linear_cross_entropy
from pipeline.model.layers import LMHead
from pipeline.model.loss import cross_entropy
from pipeline.model.on_cpu import bfloat16_factors

TOKENS, VOCAB, WIDTH = 37, 211, 24


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = (scale * torch.randn(TOKENS, WIDTH, generator=generator)).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def exact(x: Tensor, weight: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss and both gradients, by autograd in float64."""
    wide, matrix = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = wide @ matrix.T
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
    loss = loss + z_loss * logits.logsumexp(-1).square().mean()
    return loss.detach(), *torch.autograd.grad(loss, (wide, matrix))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_loss_and_gradients_are_exact_with_any_chunk(chunk, z_loss):
    x, weight, targets = inputs(torch.float64)
    parts = linear_cross_entropy(x, weight, targets, chunk, z_loss)
    found = torch.autograd.grad(parts.loss, (x, weight))
    for a, b in zip((parts.loss, *found), exact(x, weight, targets, z_loss), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(parts.cross_entropy, exact(x, weight, targets)[0])
    assert not parts.cross_entropy.requires_grad


@pytest.fixture(params=[False, True])
def other_processor(request, monkeypatch) -> None:
    """Both ways to multiply, whatever this processor would take."""
    for name in ("MULTIPLY_BY_ONEDNN", "ROUND_PRODUCTS"):
        monkeypatch.setattr(on_cpu, name, request.param)


@pytest.mark.usefixtures("other_processor")
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-5)])
def test_loss_and_gradients_are_as_close_to_float64_as_those_of_the_whole_logits(dtype, floor):
    x, weight, targets = inputs(dtype, scale=0.3)
    expected = exact(x, weight, targets)
    whole = cross_entropy(x @ weight.T, targets)
    parts = linear_cross_entropy(x, weight, targets, 10)
    ours = (parts.loss, *torch.autograd.grad(parts.loss, (x, weight)))
    theirs = (whole, *torch.autograd.grad(whole, (x, weight)))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == dtype
    for a, b, c in zip(ours, theirs, expected, strict=True):
        assert error(a, c) <= 1.3 * error(b, c) + floor


@pytest.mark.usefixtures("other_processor")
def test_the_weights_gradient_is_summed_in_float32_over_the_chunks(monkeypatch):
    """In bfloat16, the sum would lose what is added to it after a few hundred chunks."""
    x, weight, targets = inputs(torch.bfloat16, scale=0.3)
    x, targets = x.detach().repeat(30, 1).requires_grad_(), targets.repeat(30)
    monkeypatch.setattr(on_cpu, "CACHED_ELEMENTS", 50 * WIDTH)  # the last block of rows is a short one
    loss = linear_cross_entropy(x, weight, targets, chunk_tokens=2).loss
    (found,) = torch.autograd.grad(loss, weight)
    assert error(found, exact(x, weight, targets)[2]) < 3e-3


def test_the_gradient_of_a_scaled_loss_is_scaled():
    x, weight, targets = inputs()
    (whole,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 10).loss, weight)
    (part,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 10).loss / 4, weight)
    assert torch.equal(part, whole / 4)


def test_a_second_backward_is_refused_instead_of_scaling_twice():
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, targets, 10).loss
    torch.autograd.grad(loss, (x, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified"):
        torch.autograd.grad(loss, (x, weight))


def test_leading_dimensions_are_kept_in_the_gradient():
    x, weight, targets = inputs()
    batched = x.detach()[:36].view(3, 12, WIDTH).requires_grad_()
    flat = x.detach()[:36].clone().requires_grad_()
    a = linear_cross_entropy(batched, weight, targets[:36].view(3, 12), 10).loss
    b = linear_cross_entropy(flat, weight, targets[:36], 10).loss
    assert torch.equal(a, b)
    assert torch.equal(torch.autograd.grad(a, batched)[0].view(36, WIDTH), torch.autograd.grad(b, flat)[0])


def bfloat16_factors_are_rounded() -> bool:
    """Whether this processor gains by it: oneDNN rounds them only for AMX."""
    factor = torch.full((64, 64), 1 + 2**-12)
    with bfloat16_factors():
        return bool((factor @ factor == 64).all())


@pytest.mark.usefixtures("other_processor")
def test_under_autocast_float32_weights_get_float32_gradients_of_bfloat16_products():
    x, weight, targets = inputs(scale=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        parts = linear_cross_entropy(x, weight, targets, 10)
    found = torch.autograd.grad(parts.loss, (x, weight))
    assert parts.loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in found)
    low, matrix = x.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    same = linear_cross_entropy(low, matrix, targets, 10)
    if bfloat16_factors_are_rounded():
        assert torch.equal(parts.loss, same.loss)
    else:
        torch.testing.assert_close(parts.loss, linear_cross_entropy(x, weight, targets, 10).loss)
    for a, b in zip(found, torch.autograd.grad(same.loss, (low, matrix)), strict=True):
        assert error(a, b.double()) < 4e-3


class Products(TorchDispatchMode):
    """Notes the dtypes of the results of all products of matrices, and the shapes of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.casts: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes.append(result.dtype)
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.casts.append(result.shape)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", [False, True])
def test_on_a_cpu_the_logits_are_never_rounded_and_gradients_only_where_that_is_faster(rounds, dtype, monkeypatch):
    monkeypatch.setattr(on_cpu, "ROUND_PRODUCTS", rounds)
    x, weight, targets = inputs(dtype)
    with Products() as products, torch.autocast("cpu", torch.bfloat16):
        linear_cross_entropy(x, weight, targets)
    of_gradients = torch.bfloat16 if rounds else torch.float32
    assert products.dtypes == [torch.float32, of_gradients, of_gradients]
    # Of the weight and of the tokens, a cast for the logits or one for the gradients, never the same twice.
    expected = (dtype != torch.float32) + (rounds and dtype != torch.bfloat16)
    assert [products.casts.count(t.shape) for t in (x, weight)] == [expected, expected]


def test_logits_far_apart_do_not_overflow():
    x, weight, targets = inputs(scale=1e5)
    parts = linear_cross_entropy(x, weight, targets, 10)
    found = torch.autograd.grad(parts.loss, (x, weight))
    assert all(t.isfinite().all() for t in (parts.loss, *found))
    torch.testing.assert_close(parts.loss.double(), exact(x, weight, targets)[0])


class Rows(TorchDispatchMode):
    """Notes the most rows of any result as wide as the vocabulary; the transposed weight has fewer than a chunk."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 2 and result.shape[1] == VOCAB:
            self.most = max(self.most, len(result))
        return result


def test_no_more_than_a_chunk_of_logits_exists():
    x, weight, targets = inputs()
    with Rows() as rows:
        linear_cross_entropy(x, weight, targets, 30).loss.backward()
    assert rows.most == 30


def test_without_gradients_only_the_loss_is_computed():
    x, weight, targets = inputs()
    with torch.no_grad(), Rows() as rows:
        parts = linear_cross_entropy(x, weight, targets, 30)
    assert rows.most == 30 and not parts.loss.requires_grad
    torch.testing.assert_close(parts.loss, cross_entropy(x @ weight.T, targets).detach())


def test_the_head_gives_logits_without_targets_and_the_loss_with_them():
    x, _, targets = inputs()
    head = LMHead(WIDTH, VOCAB)
    assert set(head.state_dict()) == {"weight"}
    assert torch.equal(head(x), x @ head.weight.T)
    torch.testing.assert_close(head(x, targets, 8).loss, cross_entropy(head(x), targets))


def test_ignored_targets_count_neither_in_the_mean_nor_in_the_gradients():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (9,), generator=generator)
    kept = [0, 2, 3, 7]
    some = torch.full_like(targets, IGNORED)
    some[kept] = targets[kept]
    for z_loss in (0.0, 0.1):
        found = linear_cross_entropy(x, weight, some, chunk_tokens=2, z_loss=z_loss)
        wanted = linear_cross_entropy(x[kept], weight, targets[kept], chunk_tokens=9, z_loss=z_loss)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(*(torch.autograd.grad(parts.loss, (x, weight)) for parts in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b)
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED), chunk_tokens=4)
    assert float(nothing.cross_entropy) == 0 and not any(
        g.any() for g in torch.autograd.grad(nothing.loss, (x, weight))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_form_that_is_compiled_computes_the_same(monkeypatch, dtype, z_loss):
    monkeypatch.setattr(chunked_loss, "_compiled", lambda: chunked_loss._look_at)
    x, weight, targets = inputs(dtype, scale=0.3)
    targets[[3, 30]] = IGNORED
    found = linear_cross_entropy(x, weight, targets, 10, z_loss, compiled=True)
    wanted = linear_cross_entropy(x, weight, targets, 10, z_loss)
    torch.testing.assert_close(found, wanted)
    assert found.loss.dtype == torch.float32
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-4}
    for a, b in zip(*(torch.autograd.grad(parts.loss, (x, weight)) for parts in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, **close)
