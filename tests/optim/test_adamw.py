"""Our AdamW makes PyTorch's steps, in ZeRO's layouts and with steps that do not count."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pipeline.optim.adamw import AdamW, adamw_formula, decay_groups
from pipeline.optim.clipping import clip_divisor, scale_to_norm, squared_norm

MOMENTS = ("exp_avg", "exp_avg_sq")


def steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3,), (17, 9), (1 << 17 | 13,), (600, 700)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_hundred_steps_equal_pytorchs(weight_decay):
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    steps(AdamW(ours, **settings), ours, 100)
    steps(torch.optim.AdamW(theirs, **settings), theirs, 100)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_one_flat_partition_gives_the_same_bits_as_whole_parameters():
    whole = parameters()
    flat = [torch.nn.Parameter(torch.cat([p.detach().view(-1) for p in whole]))]
    found = []
    for params in (whole, flat):
        optimizer = AdamW(params, lr=1e-2)
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            grads = torch.randn(sum(p.numel() for p in params), generator=generator)
            for p, g in zip(params, grads.split([p.numel() for p in params]), strict=True):
                p.grad = g.view(p.shape).clone()
            optimizer.step()
        kept = ([p.detach(), *(optimizer.state[p][key] for key in MOMENTS)] for p in params)
        found.append([torch.cat([t.view(-1) for t in parts]) for parts in zip(*kept, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_state_survives_a_round_trip_and_the_next_steps_are_the_same_bits():
    a = parameters()
    optimizer = AdamW(a, lr=1e-2)
    steps(optimizer, a, 7)
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    other = AdamW(b, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, a, 3)
    steps(other, b, 3)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_norm_gains_decay_only_on_request():
    from pipeline.model.transformer import TransformerLM

    model = TransformerLM(11, 4, 8, 1, 2, 16, 10000.0)
    matrices, norms = decay_groups(model, 0.1)
    assert {p.ndim for p in matrices["params"]} == {2} and matrices["weight_decay"] == 0.1
    assert {p.ndim for p in norms["params"]} == {1} and norms["weight_decay"] == 0
    (everything,) = decay_groups(model, 0.1, decay_norms=True)
    assert len(everything["params"]) == len(list(model.parameters()))


def test_matrices_that_zero_3_has_flattened_decay():
    model = torch.nn.Linear(3, 2)
    for p in model.parameters():
        p.ds_shape = p.shape
        p.data = p.data.view(-1)
    matrices, gains = decay_groups(model, 0.1)
    assert matrices["params"] == [model.weight] and gains["params"] == [model.bias]


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_an_error_names_a_setting_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamW(parameters(), **bad)


def test_a_step_that_does_not_count_changes_nothing_now_or_later():
    """Holds for the host's decision (a bool) and the device's (a tensor), with non-finite gradients in between."""
    for kind in (bool, torch.tensor):
        ours, plain = parameters(), parameters()
        optimizer, reference = AdamW(ours, lr=1e-2, weight_decay=0.1), AdamW(plain, lr=1e-2, weight_decay=0.1)
        steps_seen = 0
        for counts in (False, True, True, False, False, True):
            generator = torch.Generator().manual_seed(steps_seen)
            for p, q in zip(ours, plain, strict=True):
                q.grad = torch.randn(p.shape, generator=generator)
                p.grad = q.grad.clone() if counts else torch.full_like(p, math.nan if steps_seen else math.inf)
            before = [p.detach().clone() for p in ours]
            optimizer.counts = kind(counts)
            optimizer.step()
            if counts:
                steps_seen += 1
                reference.step()
            else:
                assert all(torch.equal(p, b) for p, b in zip(ours, before, strict=True))
        for p, q in zip(ours, plain, strict=True):
            assert int(optimizer.state[p]["step"]) == int(reference.state[q]["step"]) == 3
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6 if kind is torch.tensor else 0)
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], reference.state[q]["exp_avg_sq"])


def test_a_hundred_steps_that_the_device_decides_on_equal_pytorchs():
    ours, theirs = parameters(), parameters()
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = AdamW(ours, **settings)
    optimizer.counts = torch.tensor(True)
    steps(optimizer, ours, 100)
    steps(torch.optim.AdamW(theirs, **settings), theirs, 100)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("counts", [True, torch.tensor(True)])
def test_a_fused_step_equals_the_formula_in_float64(counts):
    ours = parameters()
    optimizer = AdamW(ours, **SETTINGS)
    optimizer.counts = counts
    for step in range(1, 21):
        moments = [[optimizer.state[p].get(k, torch.zeros(())).double() for k in MOMENTS] for p in ours]
        weights = [p.detach().double() for p in ours]
        steps(optimizer, ours, 1)
        for p, weight, both in zip(ours, weights, moments, strict=True):
            expected = adamw_formula(weight, p.grad.double(), *both, torch.tensor(step), **SETTINGS)
            found = (p.detach(), *(optimizer.state[p][k] for k in MOMENTS))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1.2e-7, atol=7e-7)


@pytest.mark.parametrize("kind", ["float64", "strided", "bfloat16 gradient"])
def test_tensors_that_the_kernel_does_not_take_make_the_same_steps(kind):
    """The kernel reads bare memory: a gradient laid out otherwise than its weight would be taken for another one."""
    start = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    plain = torch.nn.Parameter(start.clone())
    odd = torch.nn.Parameter(start.double() if kind == "float64" else start.clone())
    odd.grad_dtype = None  # allows a gradient of another dtype
    optimizers = AdamW([plain], **SETTINGS), AdamW([odd], **SETTINGS)
    for step, counts in enumerate((True, False, True)):
        grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(step)).bfloat16()
        plain.grad = grad.float()
        laid_out = {"float64": grad.double(), "strided": grad.float().T.contiguous().T, "bfloat16 gradient": grad}
        odd.grad = laid_out[kind]
        for optimizer in optimizers:
            optimizer.counts, optimizer.grad_divisor = torch.tensor(counts), torch.tensor(2.0)
            optimizer.step()
    torch.testing.assert_close(odd.float(), plain, rtol=0, atol=7e-7)
    assert int(optimizers[1].state[odd]["step"]) == 2


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_dividing_in_the_step_equals_clipping_before_it(max_norm):
    ours, theirs = parameters(), parameters()
    folded, plain = AdamW(ours, **SETTINGS), AdamW(theirs, **SETTINGS)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        norm = squared_norm([p.grad for p in ours]).sqrt()
        folded.grad_divisor = clip_divisor(norm, max_norm)
        scale_to_norm([q.grad for q in theirs], norm, max_norm)
        folded.step()
        plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0 if max_norm > 1 else 7e-7)
