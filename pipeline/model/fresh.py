"""Fresh weights as a pure function of (seed, name, place), so that a rank draws only what it holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

VERSION = 2
"""Of the numbers drawn here; version 1 drew whole parameters one after another from torch's global generator."""

BLOCK = 1 << 18
"""Elements that share a generator: the most that is drawn without being used, and 1 MB."""

CUT = 3.0
"""Standard deviations at which the normal distributions are cut."""


def fill_fresh(out: Tensor, name: str, shape: Sequence[int], seed: int, start: int = 0) -> None:
    """Fills a part of a parameter with its fresh weights: the same numbers however the parameter is cut.

    Matrices are truncated-normal with std sqrt(2 / (d_in + d_out)) (Glorot & Bengio 2010, eq. 16, in its normal form),
    the token embedding with std 1, both cut at three standard deviations; the gains of norms are 1.

    Args:
        out: `(length,)` of the parameter's elements from `start`, on any device.
        name: The parameter's name in the state dict.
        shape: The whole parameter's.
        seed: The experiment's.
        start: Index of the first element, in the flattened parameter.
    """
    if len(shape) == 1:
        out.fill_(1.0)
        return
    std = 1.0 if name == "token_embeddings.weight" else math.sqrt(2.0 / (shape[0] + shape[1]))
    out = out.detach()  # threads do not inherit no_grad
    end, total = start + out.numel(), math.prod(shape)

    def fill(block: int) -> None:
        first = block * BLOCK
        drawn = _truncated_normal(f"{seed}/{name}/{block}", min(BLOCK, total - first))
        low, high = max(start, first), min(end, first + len(drawn))
        out[low - start : high - start].copy_(torch.from_numpy(drawn[low - first : high - first]).mul_(std))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(start // BLOCK, -(-end // BLOCK))))


def _truncated_normal(key: str, count: int) -> np.ndarray:
    """Returns float32 numbers of the standard normal distribution between -CUT and CUT.

    By NumPy, whose numbers do not depend on the processor's vector units as PyTorch's do.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    numbers = generator.standard_normal(count, dtype=np.float32)
    outside = np.flatnonzero(np.abs(numbers) > CUT)
    while outside.size:
        numbers[outside] = generator.standard_normal(outside.size, dtype=np.float32)
        outside = outside[np.abs(numbers[outside]) > CUT]
    return numbers
