"""A parameter's initial weights depend only on name, shape and seed, and have the layers' distribution."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.train.engine.fresh import BLOCK, fill_fresh


def fresh(name, shape, seed):
    whole = torch.empty(math.prod(shape))
    fill_fresh(whole, name, shape, seed)
    return whole.view(shape)


def test_weights_depend_on_name_and_seed_but_not_on_what_was_drawn_before():
    before = torch.get_rng_state()
    first = fresh("layers.1.ffn.w1.weight", (64, 48), 5)
    fresh("layers.0.ffn.w1.weight", (10, 10), 5)
    assert torch.equal(fresh("layers.1.ffn.w1.weight", (64, 48), 5), first)
    assert not torch.equal(fresh("layers.0.ffn.w1.weight", (64, 48), 5), first)
    assert not torch.equal(fresh("layers.1.ffn.w1.weight", (64, 48), 6), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_these_are_the_numbers_of_version_2():
    """A change of these numbers needs a new INIT_VERSION: resumed and restarted runs would differ."""
    first = fresh("lm_head.weight", (97, 48), 0).view(-1)[:4]
    torch.testing.assert_close(
        first, torch.tensor([-0.15331015, -0.05278481, 0.25351128, -0.16797994]), rtol=1e-5, atol=0
    )


def test_a_part_has_the_numbers_of_the_whole_across_the_blocks_that_are_drawn_at_once():
    name, shape = "lm_head.weight", (1000, 600)
    whole = fresh(name, shape, 3).view(-1)
    for start, length in [(0, 7), (BLOCK - 3, 6), (BLOCK + 1, BLOCK), (599_000, 1000), (5, 599_990)]:
        part = torch.full((length,), torch.nan)
        fill_fresh(part, name, shape, 3, start)
        assert torch.equal(part, whole[start : start + length]), start


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [("token_embeddings.weight", (500, 700), 1.0), ("layers.7.attn.q_proj.weight", (400, 900), math.sqrt(2 / 1300))],
)
def test_matrices_are_normal_and_cut_at_three_standard_deviations(name, shape, std):
    x = fresh(name, shape, 0) / std
    assert x.dtype == torch.float32 and tuple(x.shape) == shape
    assert 2.99 < float(x.abs().max()) <= 3 * (1 + 1e-6)
    assert float(x.mean()) == pytest.approx(0, abs=0.01)
    whole = math.erf(3 / math.sqrt(2))
    for edge in (-2.5, -1.0, -0.2, 0.5, 1.5, 2.8):
        below = (math.erf(edge / math.sqrt(2)) / whole + 1) / 2
        assert float((x < edge).double().mean()) == pytest.approx(below, abs=4e-3)


def test_gains_of_norms_are_one():
    for name in ("layers.0.ln1.weight", "layers.0.ln2.weight", "ln_final.weight"):
        assert torch.equal(fresh(name, (48,), 0), torch.ones(48))


def test_a_parameter_without_a_distribution_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.mystery\.weight"):
        fresh("layers.0.attn.mystery.weight", (3, 3), 0)
