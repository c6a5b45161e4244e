"""The learning-rate schedule."""

from __future__ import annotations

import math


def get_lr_cosine_schedule(
    it: int, max_learning_rate: float, min_learning_rate: float, warmup_iters: int, cosine_cycle_iters: int
) -> float:
    """Returns the learning rate at step `it`: linear warm-up from 0, a cosine down to the minimum, then the minimum.

    Source: Loshchilov & Hutter 2017, eq. 5, with one cycle; the form used by LLaMA (Touvron et al. 2023).
    """
    if it < warmup_iters:
        return it / warmup_iters * max_learning_rate
    if it >= cosine_cycle_iters:
        return min_learning_rate
    progress = (it - warmup_iters) / (cosine_cycle_iters - warmup_iters)
    return min_learning_rate + 0.5 * (1 + math.cos(math.pi * progress)) * (max_learning_rate - min_learning_rate)
