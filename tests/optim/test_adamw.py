"""Our AdamW makes PyTorch's steps, in ZeRO's layouts and with steps that do not count."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from pipeline.optim.adamw import CPU_CHUNK, AdamW, decay_groups


def steps(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(3,), (17, 9), (CPU_CHUNK + 13,), (600, 700)]
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
    for optimizer, params in ((AdamW(whole, lr=1e-2), whole), (AdamW(flat, lr=1e-2), flat)):
        for step in range(5):
            generator = torch.Generator().manual_seed(step)
            grads = torch.randn(sum(p.numel() for p in params), generator=generator)
            for p, g in zip(params, grads.split([p.numel() for p in params]), strict=True):
                p.grad = g.view(p.shape).clone()
            optimizer.step()
    assert torch.equal(torch.cat([p.view(-1) for p in whole]), flat[0])


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
