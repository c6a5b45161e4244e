"""What a person sees while a model trains."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest

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


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_always_shows_the_step_and_keeps_a_line_of_each_logged_step(monkeypatch, width):
    shown = io.StringIO()
    console = module._Output(file=shown, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    monkeypatch.setattr(module, "_Output", lambda **_: console)
    progress = Progress("a-run-with-quite-a-long-name-of-its-own", 1_200_000, 5_000_000)
    with progress:
        progress.advance(1_200_009)
        for step in (1_200_010, 1_200_020):
            progress.step(step, {**METRICS, "train/mfu": 0.41} if width == 80 else METRICS)
        console.print(progress._bar.get_renderable())
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()))
    logged = [line for line in lines if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in logged] == ["step 1200010/5000000", "step 1200020/5000000"]
    assert all("loss 3.2500" in line and "12.3k tok/s" in line and " | eta " in line for line in logged)
    assert [("norm" in line, "lr" in line) for line in logged] == [(width > 80, width > 60)] * 2
    bars = [line for line in lines if "1200020/5000000" in line and not line.startswith("step")]
    assert bars and all("loss 3.2500 · eta " in line for line in bars)
    assert all(len(line) <= width for line in lines)
    assert bool(re.search(r"eta \S+ 0:00:\d\d *$", bars[-1])) == (width >= 100), "the time elapsed goes first"


def test_a_message_on_a_terminal_breaks_between_words(monkeypatch):
    shown = io.StringIO()
    console = module._Output(file=shown, force_terminal=True, width=40, color_system=None)
    monkeypatch.setattr(module, "_Output", lambda **_: console)
    Progress("demo", 0, 100).message(f"resuming from {'x' * 50}/checkpoints with every word of it whole")
    assert shown.getvalue().split("\n") == [
        "resuming from", f"  {'x' * 50}/checkpoints", "  with every word of it whole", "",
    ]  # fmt: skip
