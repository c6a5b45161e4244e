"""`pipeline run`: prepare, train, evaluate and sample on this machine, and the table at the end."""

from __future__ import annotations

import math
import shlex
import sys
import time
from typing import TYPE_CHECKING

from rich.table import Table

from pipeline.config.sections import Config
from pipeline.errors import NothingToDo, UsageError
from pipeline.run.folder import Run, run_for
from pipeline.run.world import world_from_environment
from pipeline.terminal import Terminal
from pipeline.text_format import echo, rounded_duration

if TYPE_CHECKING:
    from pipeline.train.evaluate import Evaluation


def run_all(config: Config) -> None:
    """Turns raw text into a trained model and prints the results; every stage resumes where it was interrupted.

    Raises:
        UsageError: Several processes were started; all of them would prepare the same data.
            Or another start trains the run.
    """
    if world_from_environment().size > 1:
        raise UsageError("`pipeline run` is one process; run `pipeline prepare`, then `pipeline train` on every rank")
    from pipeline.commands.other_start import refuse_other_start
    from pipeline.commands.sample import sample_run
    from pipeline.data.baseline import bigram_loss
    from pipeline.data.build.display import prepare_here
    from pipeline.data.dataset import open_dataset
    from pipeline.tracking.upload.sync import sync_quietly
    from pipeline.train.evaluate import evaluate_run
    from pipeline.train.loop import train

    began = time.monotonic()
    refuse_other_start(config)
    prepare_here(config)
    try:
        train(config)
    except NothingToDo as done:
        echo(f"pipeline: {done}", sys.stderr)
    run = run_for(config)
    evaluation = evaluate_run(run)
    data = config.data
    train_data, validation_data = (
        open_dataset(data.path, name, token_folder=data.token_folder) for name in ("train", "validation")
    )
    bigram = bigram_loss(train_data, validation_data, config.model.context_length, config.model.vocab_size)
    texts = sample_run(run)
    console = Terminal()
    console.print(_results(run, evaluation, bigram, time.monotonic() - began))
    console.print("A sample:", style="bold")
    console.print(texts[0], soft_wrap=True)
    console.print(next_commands(run, config), soft_wrap=True)
    sync_quietly(run)  # tracking ended with training, before the evaluation and the sample were written


def _results(run: Run, evaluation: Evaluation, bigram: float, seconds: float) -> Table:
    table = Table("on the validation tokens", "loss (nats/token)", "perplexity", "bits/byte", title=f"run {run.name}")
    for column in table.columns[1:]:
        column.justify = "right"
    bits_per_byte_per_nat = evaluation.bits_per_byte / evaluation.loss
    for name, loss in ((f"model, step {evaluation.step}", evaluation.loss), ("bigram counts", bigram)):
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.1f}", f"{loss * bits_per_byte_per_nat:.3f}")
    table.caption = f"{evaluation.tokens:,} tokens; {rounded_duration(seconds)} in all"
    return table


def next_commands(run: Run, config: Config) -> str:
    """Returns what a person may do with a run that has finished, one command per line."""
    folder = shlex.quote(str(run.path))
    lines = {
        "checkpoints, metrics, config": str(run.path),
        "more text": f"pipeline sample {folder} --prompt 'The economy'",
        "the report": f"pipeline report {folder}",
    }
    if config.tracking.uri != "none":
        local = config.tracking.uri.startswith("sqlite:")
        lines["the MLflow page"] = f"pipeline ui {folder}" if local else config.tracking.uri
    return "\n".join(f"{what + ':':<30} {how}" for what, how in lines.items())
