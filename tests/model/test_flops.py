"""Counts of a model equal what PyTorch counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from pipeline.config.model_section import ModelConfig
from pipeline.model.flops import flops_per_token, num_parameters
from pipeline.model.transformer import TransformerLM
from tests.model.test_transformer import SHAPE, VARIANTS


@register_flop_formula(torch.ops.pipeline.onednn_linear)
def onednn_linear_flops(x, weight, bias, out_shape=None):
    return 2 * math.prod(x) * weight[0]


@pytest.mark.parametrize("variant", [{}, *VARIANTS.values()], ids=["plain", *VARIANTS])
def test_parameters_and_operations_equal_pytorchs_counts(variant):
    config = ModelConfig(**SHAPE, **variant)
    model = TransformerLM(**config.model_dump())
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    # PyTorch's counter knows the matrix products of plain attention, but not of the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 97, (1, 32))).sum().backward()
    assert counter.get_total_flops() == 32 * flops_per_token(config)
