"""The command `pipeline`: its groups of commands, and how errors become messages and exit statuses."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import sys
from typing import Annotated, Any

import typer

from pipeline import __version__
from pipeline.cli import cluster, data, evaluate, image, tracking, train
from pipeline.cli.arguments import ConfigFile, Overrides
from pipeline.cli.help import Group, use_our_help
from pipeline.cli.new import new, schema
from pipeline.devcluster import cli as devcluster
from pipeline.errors import EXIT_FAILED, NothingToDo, PackageMissing, PipelineError, StopRequested, in_words
from pipeline.text_format import PlainFormatter, echo


class _Interrupted(PipelineError):
    """Ctrl-C while no training was running that could save."""

    def __init__(self) -> None:
        super().__init__("interrupted; the same command resumes from what is finished")


class _Commands(Group):
    def invoke(self, ctx: Any) -> Any:
        # Typer itself would end with status 130, which is not a documented one, and without a message.
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    name="pipeline",
    cls=_Commands,
    help="Turn text into token shards and a trained language model, on this machine or on a Slurm cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(new)
app.command()(schema)


@app.command()
def run(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Prepare, train, evaluate and sample on this machine."""
    from pipeline.commands.run_all import run_all

    run_all(train.config_for_this_world(config_file, overrides))


for group in (data, train, evaluate, tracking, cluster):
    app.add_typer(group.app)
app.add_typer(image.app, name="image")
app.add_typer(devcluster.app, name="devcluster")
use_our_help(app)


def main() -> None:
    """Runs the command line; a user's mistake becomes one message on stderr and the documented exit status."""
    # MLflow reports usage by default; nothing that this project starts does so unless the user asks for it.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # No package may change how a config is checked; to look for such plugins takes a twentieth of a short command.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PlainFormatter())
    for stream in (sys.stdout, sys.stderr):
        # Text or a file name may hold characters that the terminal's encoding does not.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (StopRequested, NothingToDo, _Interrupted) as stop:
        echo(f"pipeline: {stop}", sys.stderr)
        sys.exit(stop.exit_code)
    except PipelineError as error:
        echo(f"pipeline: error: {error}", sys.stderr)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or importlib.util.find_spec(package) is not None:
            raise  # it is there, but damaged
        missing = PackageMissing(package)
        echo(f"pipeline: error: {missing}", sys.stderr)
        sys.exit(missing.exit_code)
    except OSError as error:  # a name that no file system takes, a folder that disappeared
        echo(f"pipeline: error: {in_words(error)}", sys.stderr)
        sys.exit(EXIT_FAILED)
