"""Fits the constants of the time model to the runs that are marked for it."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import numpy as np
from scipy.optimize import least_squares

from benchmarks.published.runs import Run
from pipeline.plan import step_time
from pipeline.plan.devices import AMPERE, HOPPER

CONSTANTS = {
    "A100: share of the peak": AMPERE.expected, "H100: share of the peak": HOPPER.expected,
    "communication that nothing hides": 1 - step_time.LIKELY[1], "traffic": step_time.TRAFFIC,
    "traffic, compiled": step_time.TRAFFIC_COMPILED, "traffic, stage 3": step_time.TRAFFIC_STAGE_3,
}  # fmt: skip


def calibrate(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Returns the constants in use, as fitted to the logarithms of the step times, and their standard errors."""
    used = np.array(list(CONSTANTS.values()), dtype=float)

    def residuals(scales: np.ndarray) -> list[float]:
        values = scales * used
        return [float(np.log(_predicted(run, values) / run.step_s)) for run in runs]

    # Outliers of more than 5% count less: one run of a table may have had a bad day.
    found = least_squares(residuals, np.ones(len(used)), bounds=(0.0, 3.0), loss="soft_l1", f_scale=0.05)
    spread = np.linalg.pinv(found.jac.T @ found.jac) * np.mean(found.fun**2)
    return {
        name: {"used": round(float(value), 3), "fitted": round(float(fit), 3), "standard error": round(float(error), 3)}
        for name, value, fit, error in zip(
            CONSTANTS, used, found.x * used, np.sqrt(np.diag(spread)) * used, strict=True
        )
    }


def _predicted(run: Run, values: np.ndarray) -> float:
    ampere, hopper, exposed, *traffic = map(float, values)
    products = ampere if run.device.products is AMPERE else hopper
    names = ("TRAFFIC", "TRAFFIC_COMPILED", "TRAFFIC_STAGE_3")
    reached = step_time.Reached(products, step_time.LIKELY[0], 1 - exposed, 1.0)
    with patch.multiple(step_time, **dict(zip(names, traffic, strict=True))):
        batch = run.config.train.batch_size
        return step_time.step_time(run.config, run.device, run.network, batch, reached).total_s
