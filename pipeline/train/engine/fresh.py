"""Fresh weights as a pure function of (seed, name, place), so that a rank draws only what it holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

INIT_VERSION = 2
"""Of the numbers drawn here; version 1 drew whole parameters one after another from torch's global generator."""

BLOCK = 1 << 18
"""Elements that share a generator: the most that is drawn without being used, and 1 MB."""

_CUT = 3.0  # standard deviations


def fill_fresh(out: Tensor, name: str, shape: Sequence[int], seed: int, start: int = 0, tied: bool = False) -> None:
    """Fills a part of a parameter with its fresh weights: the same numbers however the parameter is cut.

    The distributions are those of the modules' constructors.

    Args:
        out: `(length,)`: the parameter's elements from `start`, on any device.
        name: The parameter's name in the state dict; with the seed, it determines the numbers.
        shape: The whole parameter's.
        seed: The experiment's.
        start: Index of the first element, in the flattened parameter.
        tied: Whether the output layer uses the weight of the embedding.

    Raises:
        ValueError: No distribution is known for the name.
    """
    module = name.split(".")[-2] if "." in name else name
    if module not in _STD:
        raise ValueError(
            f"no initial distribution is known for the parameter {name}; add {module!r} to train/engine/fresh.py"
        )
    std_of = _STD[module]
    if std_of is None or name.endswith(".bias"):
        out.fill_(1.0 if std_of is None else 0.0)
        return
    std = shape[-1] ** -0.5 if tied and module == "token_embeddings" else std_of(shape)
    out = out.detach()  # threads do not inherit no_grad
    end, total = start + out.numel(), math.prod(shape)

    def fill(block: int) -> None:
        first = block * BLOCK
        drawn = _truncated_normal(f"{INIT_VERSION}/{seed}/{name}/{block}", min(BLOCK, total - first))
        low, high = max(start, first), min(end, first + len(drawn))
        out[low - start : high - start].copy_(torch.from_numpy(drawn[low - first : high - first]).mul_(std))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(start // BLOCK, -(-end // BLOCK))))


def _linear(shape: Sequence[int]) -> float:
    return math.sqrt(2.0 / sum(shape))


_STD: dict[str, Callable[[Sequence[int]], float] | None] = {
    "token_embeddings": lambda _: 1.0,
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3", "lm_head"), _linear),
    **dict.fromkeys(("ln1", "ln2", "ln_final", "q_norm", "k_norm")),
}
"""The standard deviation of a weight by the name of its module; None for gains, which are 1. Biases are 0."""


def _truncated_normal(key: str, count: int) -> np.ndarray:
    """Returns float32 numbers of the standard normal distribution between -_CUT and _CUT.

    By NumPy, whose numbers do not depend on the processor's vector units as PyTorch's do.
    """
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    numbers = generator.standard_normal(count, dtype=np.float32)
    outside = np.flatnonzero(np.abs(numbers) > _CUT)
    while outside.size:
        numbers[outside] = generator.standard_normal(outside.size, dtype=np.float32)
        outside = outside[np.abs(numbers[outside]) > _CUT]
    return numbers
