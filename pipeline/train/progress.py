"""What a person sees while a model trains: a line per logged step, and on a terminal a bar below them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

from pipeline.config.sections import Config
from pipeline.errors import PipelineError
from pipeline.model.flops import num_parameters
from pipeline.run.world import World
from pipeline.terminal import Terminal
from pipeline.text_format import count, duration, short, wrapped

_WIDE = 100
_LONGEST_NAME = 20
# What a line leaves out first where the terminal is narrow.
_FIRST_TO_GO = ("train/flops_per_s", "train/grad_norm", "train/mfu", "train/lr")


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
        opening: What is shown before the first step.
    """

    def __init__(
        self, name: str, start_step: int, max_iters: int, enabled: bool = True, opening: Sequence[str] = ()
    ) -> None:
        self._opening = opening
        self._enabled = enabled
        self._max_iters = max_iters
        self._first = start_step
        self._began = time.monotonic()
        self._console = _Output(stderr=True)
        self._live = enabled and self._console.is_terminal
        columns: list[ProgressColumn] = [
            TextColumn("[bold]{task.description}", table_column=_one_line(max_width=_LONGEST_NAME)),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=_one_line()),
            TextColumn("{task.fields[figures]}", table_column=_one_line()),
        ]
        if self._console.width >= _WIDE:
            columns.append(TimeElapsedColumn(table_column=_one_line()))
        self._bar = Bar(*columns, console=self._console, disable=not self._live)
        self._task = self._bar.add_task(name, total=max_iters, completed=start_step, figures="starting")

    def __enter__(self) -> Self:
        for line in self._opening:
            self.message(line)
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
        """Prints a line for a logged step: loss, learning rate, gradient norm, throughput and the time left.

        On a narrow terminal it leaves out what matters least.

        Args:
            step: Finished steps.
            metrics: By the keys of `metrics.jsonl`; missing ones get no column.
        """
        if not self._enabled:
            return
        left = f"eta {duration(self._seconds_left(step))}"
        columns = {
            "count": f"step {step:>{len(str(self._max_iters))}}/{self._max_iters}",
            **_columns(metrics),
            "eta": left,
        }
        line = " | ".join(columns.values())
        if self._live:
            loss = [columns["train/loss"]] if "train/loss" in columns else []
            self._bar.update(self._task, completed=step, figures=" · ".join([*loss, left]))
            for name in _FIRST_TO_GO:
                if len(line) > self._console.width:
                    columns.pop(name, None)
                    line = " | ".join(columns.values())
        self._console.print(line, soft_wrap=True)

    def message(self, text: str) -> None:
        """Prints a line above the bar, which on a terminal breaks between words."""
        if self._enabled:
            self._console.print(wrapped(text, self._console.width) if self._live else text, soft_wrap=True)

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self._first)
        return (time.monotonic() - self._began) / done * (self._max_iters - step)


def opening(config: Config, world: World, device: torch.device, training_tokens: int, folder: Path) -> list[str]:
    """Returns what is about to be trained, in a few lines.

    Args:
        config: The experiment.
        world: The processes.
        device: That of this process.
        training_tokens: Tokens of the training split.
        folder: The run folder.
    """
    train, model = config.train, config.model
    per_step = train.batch_size * model.context_length
    tokens = per_step * train.max_iters
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    processes = "1 process" if world.size == 1 else f"{world.size:,} processes"
    zero = f", ZeRO stage {train.zero_stage}" if train.zero_stage else ""
    return [
        f"{config.name}: {count(num_parameters(model))} parameters, {train.precision}, {processes} on {where}{zero}",
        f"{train.max_iters:,} steps of {count(per_step)} tokens: {count(tokens)} tokens, "
        f"{tokens / training_tokens:.3g} epochs; run folder {folder}",
    ]


def _one_line(max_width: int | None = None) -> Column:
    return Column(no_wrap=True, overflow="ellipsis", max_width=max_width)


def _columns(metrics: Mapping[str, float]) -> dict[str, str]:
    """Returns what is shown of the metrics, by their keys; FLOP/s only where there is no MFU."""
    shown = {
        "train/loss": lambda value: f"loss {value:.4f}",
        "val/loss": lambda value: f"val loss {value:.4f}",
        "train/lr": lambda value: f"lr {value:.2e}",
        "train/grad_norm": lambda value: f"norm {value:.2f}",
        "train/tokens_per_s": lambda value: f"{short(value)} tok/s",
        "train/mfu": lambda value: f"MFU {value:.1%}",
        "train/flops_per_s": lambda value: f"{short(value)}FLOP/s",
    }
    if "train/mfu" in metrics:
        del shown["train/flops_per_s"]
    return {key: text(metrics[key]) for key, text in shown.items() if key in metrics}
