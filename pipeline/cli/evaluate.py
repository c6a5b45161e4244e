"""The command that evaluates checkpoints: on the validation split, or on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.arguments import RUN_HELP
from pipeline.errors import UsageError
from pipeline.text_format import echo

app = typer.Typer()


@app.command()
def evaluate(
    run_folder: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help=f"{RUN_HELP} Only --fetch needs none.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Tasks, groups or tags of lm-evaluation-harness.")
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="With --tasks: step of the checkpoint; the newest by default."),
    ] = None,
    every_checkpoint: Annotated[
        bool, typer.Option("--every-checkpoint", help="With --tasks: all checkpoints.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --tasks: only the first documents of each.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="K", min=0, help="With --tasks: examples before each document.")
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="With --tasks: further ones, YAML of the harness without code.")
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="With --tasks: only fetch their data; nothing else uses the network.")
    ] = False,
) -> None:
    """Print the loss on the whole validation split; with --tasks, the scores on tasks."""
    if tasks is None:
        if fetch or every_checkpoint or (step, limit, num_fewshot, include_path) != (None,) * 4:
            raise UsageError("evaluate: every other option goes with --tasks; name the tasks, or leave the others out")
        if run_folder is None:
            raise UsageError("evaluate: name the run folder, or fetch the data of tasks with --tasks A,B --fetch")
        _validation(run_folder)
        return
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names:
        raise UsageError("--tasks: names no task")
    if step is not None and every_checkpoint:
        raise UsageError("give --step or --every-checkpoint")
    folder = Path(include_path) if include_path else None
    from pipeline.evaluate.console import evaluate_run_on_tasks, fetch_tasks

    if fetch:
        fetch_tasks(names, folder)
        return
    if run_folder is None:
        raise UsageError("evaluate: name the run folder, or --fetch for only fetching the tasks' data")
    from pipeline.run.folder import open_run

    opened = open_run(run_folder)
    evaluate_run_on_tasks(opened, names, limit, num_fewshot, folder, "every" if every_checkpoint else step)


def _validation(run_folder: str) -> None:
    from pipeline.run.folder import open_run

    opened = open_run(run_folder)
    from pipeline.tracking.upload.sync import sync_quietly
    from pipeline.train.evaluate import evaluate_run

    found = evaluate_run(opened)
    echo(
        f"step {found.step}: loss {found.loss:.4f} nats/token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte:.4f} bits/byte on {found.tokens:,} validation tokens"
    )
    sync_quietly(opened)
