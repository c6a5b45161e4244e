"""What a person sees while a model trains."""

from __future__ import annotations

from types import SimpleNamespace

import pipeline.train.progress as module
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


def test_the_time_left_follows_from_the_steps_of_this_start(capsys, monkeypatch):
    """Steps of earlier starts took no time of this one."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    with Progress("demo", 40, 100) as progress:
        now.seconds = 20.0
        progress.step(40, {})
        progress.step(50, {})
    first, second = capsys.readouterr().err.splitlines()
    assert first == "step  40/100 | eta 20:00"
    assert second == "step  50/100 | eta 1:40"


def test_a_validation_has_a_column_of_its_own(capsys):
    with Progress("demo", 0, 100) as progress:
        progress.step(10, {"val/loss": 2.5})
    assert "| val loss 2.5000 | eta" in capsys.readouterr().err


def test_on_a_terminal_the_bar_shows_the_figures_of_the_last_logged_step(monkeypatch):
    monkeypatch.setattr(module.Terminal, "is_terminal", property(lambda self: True))
    progress = Progress("demo", 5, 100)
    progress.advance(9)
    task = progress._bar.tasks[0]
    assert (task.completed, task.total, task.fields["figures"]) == (9, 100, "starting")
    progress.step(10, METRICS)
    assert task.completed == 10
    assert task.fields["figures"].startswith("loss 3.2500 · lr 1.00e-03 · norm 0.50")
