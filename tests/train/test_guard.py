"""The guard's decisions about single steps."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.sections import GuardConfig
from pipeline.train.guard import Guard, data_index


@given(st.integers(0, 200), st.sets(st.integers(0, 150), max_size=30))
def test_steps_train_on_every_batch_that_is_not_skipped_in_order(step, skipped):
    expected = [i for i in range(400) if i not in skipped]
    assert data_index(step, tuple(skipped)) == expected[step]


def test_a_spike_stands_out_of_the_window_and_does_not_enter_it():
    guard = Guard(GuardConfig(spike_window=30, spike_sigma=5))
    assert not any(guard.is_spike(3.0 + 0.1 * math.sin(i)) for i in range(30))
    assert guard.is_spike(9.0) and guard.is_spike(9.0)
    assert not guard.is_spike(3.1)


def test_a_guard_restored_from_its_state_decides_alike():
    losses = [2.0 + 0.2 * math.cos(i) for i in range(50)]
    whole, first = Guard(GuardConfig()), Guard(GuardConfig())
    for loss in losses[:25]:
        whole.is_spike(loss), first.is_spike(loss)
    second = Guard(GuardConfig(), json.loads(json.dumps(first.state())))
    for loss in [*losses[25:], 8.0]:
        assert whole.is_spike(loss) == second.is_spike(loss)
    whole.accept(8.0), second.accept(8.0)
    assert whole.is_spike(7.0) == second.is_spike(7.0)
    assert whole.state() == second.state()
