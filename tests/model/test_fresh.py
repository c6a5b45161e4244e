"""Initial weights depend only on a parameter's name, its shape and the seed, and have the layers' distribution."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.model.fresh import fresh, fresh_weights
from tests.model.test_transformer import small_model


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
        first, torch.tensor([0.06990752, 0.22435442, 0.04758395, -0.11400103]), rtol=1e-5, atol=0
    )


def test_all_parameters_of_a_model_are_filled_in_place():
    model = small_model()
    addresses = [p.data_ptr() for p in model.parameters()]
    fresh_weights(model, seed=3)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh(name, parameter.shape, 3))


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
