"""A power law with a limit through the final losses of runs of one kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXPONENTS = np.linspace(0.02, 2.0, 397)
LEAST_POINTS = 4
"""The law has three parameters."""
_LEVEL = 1e-9
"""Losses nearer to each other than this part of them are level: a fit would be one of rounding."""
_NEAR = 0.02
"""Largest residual, as a share of the range of the losses: points on a line of another shape are no power law."""


@dataclass(frozen=True)
class PowerLaw:
    """`limit + scale * tokens ** -exponent`."""

    limit: float
    scale: float
    exponent: float
    residual: float
    """Root of the mean squared distance of the points from it."""

    def at(self, tokens: float) -> float:
        """Returns the loss after so many tokens."""
        return float(self.limit + self.scale * tokens**-self.exponent)


def fit(tokens: Sequence[float], losses: Sequence[float]) -> PowerLaw | None:
    """Returns the least squares fit; None with too few points, or where no falling power law with a limit >= 0 is near.

    The exponent is searched on a grid; for each the rest is linear. An exponent at the edge of the grid is no fit. The
    form is that of Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", for one size of the model.
    """
    if len(set(tokens)) < LEAST_POINTS or min(tokens) <= 0:
        return None
    x, y = np.asarray(tokens, dtype=float), np.asarray(losses, dtype=float)
    if np.ptp(y) <= _LEVEL * np.abs(y).max():
        return None
    best: PowerLaw | None = None
    for exponent in _EXPONENTS:
        terms = np.stack([np.ones_like(x), (x / x[0]) ** -exponent], axis=1)
        (limit, scale), *_ = np.linalg.lstsq(terms, y, rcond=None)
        residual = float(np.sqrt(np.mean((terms @ [limit, scale] - y) ** 2)))
        if limit >= 0 and scale > 0 and (best is None or residual < best.residual):
            best = PowerLaw(float(limit), float(scale * x[0] ** exponent), float(exponent), residual)
    if best is None or best.residual > _NEAR * float(np.ptp(y)):
        return None
    return best if _EXPONENTS[0] < best.exponent < _EXPONENTS[-1] else None
