"""What a person sees while a model trains."""

from __future__ import annotations

from pipeline.train.clock import StepClock
from pipeline.train.progress import Progress

METRICS = {
    "train/loss": 3.25, "train/lr": 1e-3, "train/grad_norm": 0.5, "train/tokens_per_s": 12_345.0,
    "train/flops_per_s": 8.1e10,
}  # fmt: skip


def test_without_a_terminal_each_logged_step_is_one_plain_line(capsys):
    with Progress("demo", 0, 100) as progress:
        progress.advance(9)
        progress.step(10, METRICS)
        progress.step(20, {**METRICS, "train/mfu": 0.41})
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("step  10/100 | loss 3.2500 | lr 1.00e-03 | norm 0.50 | 12.3k tok/s | 81.0GFLOP/s | eta 0:")
    assert "MFU 41.0%" in second and "FLOP/s" not in second


def test_only_the_first_rank_speaks(capsys):
    with Progress("demo", 0, 100, enabled=False) as progress:
        progress.step(10, METRICS)
        progress.message("hello")
    assert capsys.readouterr() == ("", "")


def test_the_laps_of_a_step_add_up_to_its_time():
    clock = StepClock()
    for _ in range(3):
        clock.lap("data")
        clock.lap("forward_backward")
        clock.step_done()
    seconds = clock.read()
    assert 0 <= seconds["data"] + seconds["forward_backward"] <= seconds["step"]
    assert clock.read().keys() == {"step"}
