"""Counts of a model equal what PyTorch counts."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.model.flops import flops_per_token, num_parameters
from pipeline.model.transformer import TransformerLM
from tests.model.test_transformer import SHAPE


def test_parameters_and_operations_equal_pytorchs_counts():
    model = TransformerLM(**SHAPE, rope_theta=10000.0)
    count = num_parameters(SHAPE["vocab_size"], SHAPE["d_model"], SHAPE["num_layers"], SHAPE["d_ff"])
    assert count == sum(p.numel() for p in model.parameters())
    # PyTorch's counter knows the matrix products of plain attention, but not of the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 97, (1, 32))).sum().backward()
    assert counter.get_total_flops() == 32 * flops_per_token(97, 32, 48, 3, 64)
