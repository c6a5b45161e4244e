"""The commands of a dataset: prepare, inspect, verify."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.cli.arguments import LARGEST_SEED, ConfigFile, Overrides
from pipeline.text_format import echo

app = typer.Typer()

AdoptedFormat = Literal["megatron", "raw", "npy", "olmo"]
AdoptedType = Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
TokenFolder = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Folder of the token files of a dataset made by `pipeline adopt`.")
]


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

    config = load_config(config_file, overrides or ())
    with prepare_events(config, part):
        prepare_here(config, parse_slice(part))


@app.command()
def adopt(
    format_name: Annotated[AdoptedFormat, typer.Argument(metavar="FORMAT", help="megatron, raw, npy or olmo.")],
    paths: Annotated[list[str], typer.Argument(metavar="[NAME=]PATH...", help="Files, folders or globs of a source.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder of the dataset; new or empty.")],
    tokenizer: Annotated[str, typer.Option(metavar="FILE", help="The tokenizer.json that made the tokens.")],
    dtype: Annotated[
        AdoptedType | None, typer.Option(metavar="TYPE", help="Type of a token, `uint8` to `int64`; for raw and olmo.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]PATH", help="Files for validation; may be repeated.")
    ] = None,
    validation_fraction: Annotated[
        float,
        typer.Option(
            metavar="F", min=0, max=0.5, help="Share of each source's tokens, its last documents, for validation."
        ),
    ] = 0.001,
    end_of_text: Annotated[str | None, typer.Option(metavar="TOKEN", help="The token that ends a document.")] = None,
) -> None:
    """Make a dataset of token files that others made, left in place: check, hash and describe them."""
    from pipeline.commands.adopt import adopt_here

    adopt_here(
        format_name,
        paths,
        output,
        tokenizer,
        dtype=dtype,
        validation=validation or (),
        validation_fraction=validation_fraction,
        end_of_text=end_of_text,
    )


@app.command()
def inspect(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The dataset folder, for example `data/tokens`.")],
    split: Annotated[str, typer.Option(metavar="SPLIT", help="`train` or `validation`.")] = "train",
    count: Annotated[int, typer.Option(metavar="N", min=0, help="Number of documents to print.")] = 3,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=LARGEST_SEED, help="Seed that picks the documents.")] = 0,
    token_folder: TokenFolder = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="HTML file to write; DATASET/inspect.html by default.")
    ] = None,
) -> None:
    """Print documents of a dataset and write a page of its lengths and most frequent tokens."""
    from pipeline.data.build.display import inspect_here

    inspect_here(dataset, split, count, seed, html, token_folder)


@app.command("export-data")
def export_data(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The dataset folder, for example `data/tokens`.")],
    output: Annotated[str, typer.Option(metavar="DIR", help="Folder to write; new or empty.")],
    format_name: Annotated[
        Literal["megatron"], typer.Option("--format", metavar="FORMAT", help="Only `megatron`.")
    ] = "megatron",
    token_folder: TokenFolder = None,
) -> None:
    """Write indices by which Megatron-LM reads the token shards, without a copy of the tokens."""
    from pipeline.commands.export_data import export_megatron

    echo(export_megatron(dataset, output, token_folder))


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a dataset, a checkpoint or a run.")],
    token_folder: TokenFolder = None,
) -> None:
    """Check every byte of a dataset, a checkpoint, or a run and its dataset against the checksums."""
    from pipeline.commands.verify import verify_path

    echo(verify_path(path, token_folder))
