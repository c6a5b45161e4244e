"""The commands of a dataset: prepare, inspect, verify."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.arguments import LARGEST_SEED, ConfigFile, Overrides
from pipeline.text_format import say

app = typer.Typer()


@app.command()
def prepare(
    config_file: ConfigFile,
    overrides: Overrides = None,
    part: Annotated[
        str | None, typer.Option("--slice", metavar="I/N", help="Do only part I of N (from 1), for a Slurm array.")
    ] = None,
) -> None:
    """Turn text into token shards and a manifest; resumes after an interruption."""
    from pipeline.data.build.memory import devote_process

    devote_process()
    from pipeline.commands.prepare import prepare_events
    from pipeline.config.load import load_config
    from pipeline.data.build.display import parse_slice, prepare_here
    from pipeline.run.folder import run_for

    config = load_config(config_file, overrides or ())
    with prepare_events(run_for(config).events_file, part):
        prepare_here(config, parse_slice(part))


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The dataset folder, for example `data/tokens`.")],
    split: Annotated[str, typer.Option(help="`train` or `validation`.")] = "train",
    count: Annotated[int, typer.Option(min=0, help="Number of documents to print.")] = 3,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed that picks the documents.")] = 0,
    html: Annotated[str | None, typer.Option(help="HTML file to write; DATASET/inspect.html by default.")] = None,
) -> None:
    """Print documents of a dataset and write a page of its lengths and most frequent tokens."""
    from pipeline.data.build.display import inspect_here

    inspect_here(dataset, split, count, seed, html)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a dataset, a checkpoint or a run.")],
) -> None:
    """Check every byte of a dataset, a checkpoint, or a run and its dataset against the checksums."""
    from pipeline.commands.verify import verify_path

    say(verify_path(path))
