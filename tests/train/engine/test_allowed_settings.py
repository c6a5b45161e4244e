"""DeepSpeed's settings that a config may hold change no bit of a run, and neither does resuming with them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.test_deepspeed_keys import EXAMPLES
from tests.experiment import curve, events
from tests.train.conftest import Lab


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_all_allowed_settings_together_leave_every_bit_as_it_is(lab: Lab, stage: int) -> None:
    """Two ranks: with more, other buckets may add in another order."""
    zero: dict[str, Any] = {key: value for key, value in EXAMPLES.items() if key != "communication_data_type"}
    settings = {"deepspeed": {"communication_data_type": "fp32", "zero_optimization": zero}}
    name = f"tuned_{stage}"
    lab.train(name, 2, stage, "train.max_iters=5", **settings)
    run = lab.train(name, 2, stage, "train.max_iters=12", **settings)
    assert [e["step"] for e in events(run, "resumed")] == [5]
    assert curve(run) == curve(lab.uninterrupted(2, stage))[:12]
