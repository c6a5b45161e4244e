"""What a person sees while a model trains: a live bar on a terminal, otherwise one line per logged step."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from pipeline.errors import PipelineError
from pipeline.terminal import Terminal
from pipeline.text_format import duration, short


class _Output(Terminal):
    """Rich would end the process with a bare `SystemExit` once its output is closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())  # the last message must not fail too
        raise PipelineError(
            "its output was closed: the program that read it has ended; the same command resumes the run, with its "
            "output in a file"
        )


class Progress:
    """Shows steps as they finish.

    Args:
        name: Name of the run.
        start_step: Steps finished before this start.
        max_iters: Total steps of the run.
        enabled: Whether to show anything: False on every rank but the first.
    """

    def __init__(self, name: str, start_step: int, max_iters: int, enabled: bool = True) -> None:
        self._enabled = enabled
        self._max_iters = max_iters
        self._first = start_step
        self._began = time.monotonic()
        self._console = _Output(stderr=True)
        self._live = enabled and self._console.is_terminal
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(name, total=max_iters, completed=start_step, figures="starting")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Moves the bar to a finished step; cheap enough for every step."""
        if self._live:
            self._bar.update(self._task, completed=step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a logged step: loss, learning rate, gradient norm, throughput and the time left.

        Args:
            step: Finished steps.
            metrics: By the keys of `metrics.jsonl`; missing ones get no column.
        """
        if not self._enabled:
            return
        columns = [*_columns(metrics), f"eta {duration(self._seconds_left(step))}"]
        if self._live:
            self._bar.update(self._task, completed=step, figures=" · ".join(columns))
        else:
            count = f"step {step:>{len(str(self._max_iters))}}/{self._max_iters}"
            self._console.print(" | ".join([count, *columns]), soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._enabled:
            self._console.print(text, soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first)
        return (time.monotonic() - self._began) / done * (self._max_iters - step)


def _columns(metrics: Mapping[str, float]) -> list[str]:
    columns = []
    if "train/loss" in metrics:
        columns.append(f"loss {metrics['train/loss']:.4f}")
    if "val/loss" in metrics:
        columns.append(f"val loss {metrics['val/loss']:.4f}")
    if "train/lr" in metrics:
        columns.append(f"lr {metrics['train/lr']:.2e}")
    if "train/grad_norm" in metrics:
        columns.append(f"norm {metrics['train/grad_norm']:.2f}")
    if "train/tokens_per_s" in metrics:
        columns.append(f"{short(metrics['train/tokens_per_s'])} tok/s")
    if "train/mfu" in metrics:
        columns.append(f"MFU {metrics['train/mfu']:.1%}")
    elif "train/flops_per_s" in metrics:
        columns.append(f"{short(metrics['train/flops_per_s'])}FLOP/s")
    return columns
