"""The command `pipeline`: every command parses, calls one function and prints.

Nothing heavy is imported at the top: `pipeline --help` answers on a login node at once.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli import cluster, image
from pipeline.devcluster import cli as cli_devcluster
from pipeline.errors import PipelineError, StopRequested, UsageError


class _Interrupted(PipelineError):
    """Ctrl-C where no training was there to save."""

    def __init__(self) -> None:
        super().__init__("interrupted; the same command goes on from what is finished")


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        # Typer would end with 130, which is no exit status that is promised, and without a word.
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    name="pipeline",
    cls=_Commands,
    help="Text to token shards to a trained language model, here or on a Slurm cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, `train.max_iters=100` say.")
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The run folder, `runs/demo` say.")]


@app.command()
def run(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Prepare, train, evaluate and sample, here."""
    from pipeline.commands.run_all import run_all

    run_all(_config(config_file, overrides))


@app.command()
def prepare(
    config_file: ConfigFile,
    overrides: Overrides = None,
    part: Annotated[
        str | None, typer.Option("--slice", metavar="I/N", help="Do part I of N (from 1), for a Slurm array.")
    ] = None,
) -> None:
    """Turn text into token shards and a manifest; goes on where it was stopped."""
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
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="The dataset folder, `data/tokens` say.")],
    split: Annotated[str, typer.Option(help="`train` or `validation`.")] = "train",
    count: Annotated[int, typer.Option(min=0, help="Documents to print.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Which documents.")] = 0,
    html: Annotated[str | None, typer.Option(help="The page to write; DATASET/inspect.html otherwise.")] = None,
) -> None:
    """Print decoded documents of a dataset and write a page with its lengths and most frequent tokens."""
    from pipeline.data.build.display import inspect_here

    inspect_here(dataset, split, count, seed, html)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder of a dataset, a checkpoint or a run.")],
) -> None:
    """Compare every byte of a dataset, a checkpoint, or a run and its dataset, with the checksums."""
    from pipeline.commands.verify import verify_path

    print(verify_path(path))


@app.command()
def train(
    config_file: ConfigFile,
    overrides: Overrides = None,
    allow_image_change: Annotated[
        bool, typer.Option("--allow-image-change", help="Resume in another image than the run was trained in.")
    ] = False,
) -> None:
    """Train here; resumes the run if it exists."""
    from pipeline.train.loop import train as train_run

    train_run(_config(config_file, overrides), allow_image_change)


@app.command()
def sample(
    run_folder: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="How the text begins; the config's prompt otherwise.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Texts to generate.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
) -> None:
    """Print text that a trained run generates."""
    from pipeline.commands.sample import sample_run
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.sync import sync_quietly

    opened = open_run(run_folder)
    for text in sample_run(opened, prompt, count, seed):
        print(text)
    sync_quietly(opened)


@app.command()
def evaluate(run_folder: RunFolder) -> None:
    """Print loss, perplexity and bits per byte of the newest checkpoint on the whole validation split."""
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.sync import sync_quietly
    from pipeline.train.evaluate import evaluate_run

    opened = open_run(run_folder)
    found = evaluate_run(opened)
    print(
        f"step {found.step}: loss {found.loss:.4f} nats/token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte:.4f} bits/byte on {found.tokens:,} validation tokens"
    )
    sync_quietly(opened)


@app.command()
def export(
    run_folder: RunFolder,
    form: Annotated[
        str, typer.Option("--format", metavar="hf|safetensors", help="A Hugging Face folder, or one file of weights.")
    ] = "hf",
    step: Annotated[int | None, typer.Option(min=0, help="Of the checkpoint; the newest otherwise.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder or file to write; below RUN/export otherwise.")] = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also make a version of this registered model in MLflow.")
    ] = None,
) -> None:
    """Write a run's weights for other programs."""
    from pathlib import Path

    from pipeline.commands.export import export_run
    from pipeline.run.folder import open_run

    if register is not None and form != "hf":
        raise UsageError(f"--register {register}: a model version is made of --format hf, not of {form}")
    opened = open_run(run_folder)
    written = export_run(opened, form, step, Path(output) if output else None)
    print(written)
    if register is not None:
        from pipeline.tracking.upload.sync import register_export

        print(f"{register}: version {register_export(opened, written, register)}")


@app.command()
def report(
    run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; several are overlaid.")],
    output: Annotated[str | None, typer.Option(help="The HTML file; report.html in the first RUN otherwise.")] = None,
) -> None:
    """Write one self-contained HTML page: curves, goodput, restarts, config, provenance, samples."""
    from pathlib import Path

    from pipeline.run.folder import open_run
    from pipeline.tracking.report.report import write_report
    from pipeline.tracking.upload.sync import sync_quietly

    runs = [open_run(r) for r in run_folders]
    print(write_report(runs, Path(output) if output else None))
    if output is None:  # a page elsewhere is no artifact of the run
        sync_quietly(runs[0])


@app.command()
def sync(
    run_folder: RunFolder,
    uri: Annotated[
        str | None, typer.Option(help="The store, sqlite:///FILE or http(s)://...; the run's own otherwise.")
    ] = None,
) -> None:
    """Send MLflow what it has not got yet; safe at any time, as often as you like."""
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.sync import sync as sync_run

    print(sync_run(open_run(run_folder), uri).message())


@app.command()
def ui(
    run_folder: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Show the store of this run; ./mlflow.db otherwise.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port on loopback; a free one otherwise.")] = None,
) -> None:
    """Start MLflow's own page for the store, on this machine only, and print its address."""
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.ui import serve

    serve(open_run(run_folder) if run_folder else None, port)


app.add_typer(cluster.app)
app.add_typer(image.app, name="image")
app.add_typer(cli_devcluster.app, name="devcluster")


def _config(config_file: str, overrides: list[str] | None):  # type: ignore[no-untyped-def]  # pydantic stays unimported
    from pipeline.config.load import load_config
    from pipeline.run.world import world_from_environment

    return load_config(config_file, overrides or (), world_size=world_from_environment().size)


def main() -> None:
    """Runs the command line; a user's mistake becomes one message on stderr and the documented exit status."""
    # mlflow reports home by default; nothing this project starts does, unless somebody asks for it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        app()
    except (StopRequested, _Interrupted) as stop:
        print(f"pipeline: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except PipelineError as error:
        print(f"pipeline: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
