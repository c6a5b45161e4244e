"""The guard's decisions about single steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.train_sections import GuardConfig
from pipeline.errors import PipelineError
from pipeline.train.guard import Guard, data_index, record_batch


@settings(deadline=None)  # a busy machine must not fail it
@given(st.integers(0, 200), st.sets(st.integers(0, 150), max_size=30))
def test_steps_train_on_every_batch_that_is_not_skipped_in_order(step, skipped):
    expected = [i for i in range(400) if i not in skipped]
    assert data_index(step, tuple(skipped)) == expected[step]


def test_a_spike_stands_out_of_the_window_and_does_not_enter_it():
    guard = Guard(GuardConfig(spike_window=30, spike_sigma=5))
    assert not any(guard.is_spike(3.0 + 0.1 * math.sin(i)) for i in range(30))
    assert guard.is_spike(9.0) and guard.is_spike(9.0)
    assert not guard.is_spike(3.1)


def test_a_guard_restored_from_its_state_decides_like_the_first():
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


def test_a_spike_is_so_many_deviations_above_the_mean():
    """Losses of 1 and 3 have the mean 2 and the deviation 1."""
    guard = Guard(GuardConfig(spike_window=30, spike_sigma=5))
    assert not any(guard.is_spike(1.0 + 2.0 * (i % 2)) for i in range(30))
    assert guard.is_spike(7.01)
    assert not guard.is_spike(6.99)


def test_losses_that_hardly_vary_may_rise_by_a_hundredth_per_deviation():
    guard = Guard(GuardConfig(spike_window=30, spike_sigma=5))
    assert not any(guard.is_spike(2.0) for _ in range(30))
    assert guard.is_spike(2.101)
    assert not guard.is_spike(2.099)


def test_no_loss_is_a_spike_before_twenty_others_or_a_full_window():
    for window, known in ((100, 20), (8, 8)):
        guard = Guard(GuardConfig(spike_window=window))
        assert not any(guard.is_spike(1.0) for _ in range(known - 1))
        assert not guard.is_spike(100.0), "it enters the window instead"
        guard = Guard(GuardConfig(spike_window=window))
        assert not any(guard.is_spike(1.0) for _ in range(known))
        assert guard.is_spike(100.0)


def test_a_guard_that_is_off_and_a_loss_that_is_not_finite_know_no_spikes():
    off, on = Guard(GuardConfig(on_spike="off")), Guard(GuardConfig())
    for i in range(40):
        assert not off.is_spike(float(i**3)) and not on.is_spike(1.0)
    assert off.state()["losses"] == []
    assert not on.is_spike(math.inf) and not on.is_spike(math.nan)
    assert set(on.state()["losses"]) == {1.0}


def test_bad_steps_are_counted_and_a_good_one_ends_the_row(tmp_path: Path):
    guard = Guard(GuardConfig(max_bad_steps=3))
    for loss, norm in ((math.nan, 1.0), (1.0, math.inf)):
        assert guard.is_bad(loss, norm)
    guard.check_patience(tmp_path)
    assert not guard.is_bad(1.0, 1.0)
    for _ in range(2):
        assert guard.is_bad(math.nan, math.nan)
    guard.check_patience(tmp_path)
    assert guard.is_bad(math.nan, 1.0)
    with pytest.raises(PipelineError, match=f"3 steps in a row.*{tmp_path}"):
        guard.check_patience(tmp_path)
    assert guard.state() | {"losses": []} == {"losses": [], "skipped": [], "bad_in_a_row": 3, "bad_steps": 5}
    restored = Guard(GuardConfig(max_bad_steps=3), guard.state())
    with pytest.raises(PipelineError):
        restored.check_patience(tmp_path)


def test_a_run_skips_no_more_batches_than_its_rollbacks_allow():
    guard = Guard(GuardConfig(max_rollbacks=2, rollback_skip=3))
    guard.skip_batches([7, 5, 6])
    guard.skip_batches([6, 7, 20, 21, 22])
    assert guard.skipped == (5, 6, 7, 20, 21, 22)
    with pytest.raises(PipelineError, match="max_rollbacks"):
        guard.skip_batches([23])


def test_a_record_holds_text_and_origin_of_every_sample_and_is_strict_json(tmp_path: Path):
    reader = SimpleNamespace(
        batch=lambda index, start, stop: (torch.tensor([[72, 105], [72, 111]])[start:stop], None),
        describe=lambda index, start, stop: [{"shard": f"{index}.bin", "offset": i} for i in range(start, stop)],
    )
    tokenizer = SimpleNamespace(decode=lambda ids: bytes(ids).decode())
    numbers = {"step": 9, "loss": math.nan, "norm": 1.5}
    path = record_batch(tmp_path, "bad_step_00000009", reader, 8, 2, tokenizer, **numbers)  # type: ignore[arg-type]
    assert path == tmp_path / "bad_step_00000009.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 9,
        "loss": "nan",
        "norm": 1.5,
        "batch": 8,
        "samples": [
            {"row": 0, "shard": "8.bin", "offset": 0, "text": "Hi"},
            {"row": 1, "shard": "8.bin", "offset": 1, "text": "Ho"},
        ],
    }
