"""The commands that show what a run recorded: report, sync, ui."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.cli.arguments import RunFolder, RunFolders
from pipeline.errors import UsageError, refuse
from pipeline.text_format import echo

app = typer.Typer()


@app.command()
def report(
    run_folders: RunFolders,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="HTML file; report.html in the first RUN by default.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: curves, goodput, restarts, config, provenance, samples."""
    from pathlib import Path

    from pipeline.run.related import found_runs, read_sweep
    from pipeline.tracking.report.report import readable, write_report
    from pipeline.tracking.report.sweep import write_sweep_report
    from pipeline.tracking.upload.sync import sync_quietly

    if len(run_folders) == 1 and read_sweep(run_folders[0]):
        echo(write_sweep_report(Path(run_folders[0]), Path(output) if output else None))
        return
    runs, problems = found_runs(run_folders)
    runs, damaged = readable(runs)
    echo(write_report(runs, Path(output) if output else None))
    if output is None:  # a page elsewhere is not an artifact of the run
        sync_quietly(runs[0])
    refuse(problems + damaged)


@app.command()
def sync(
    run_folder: RunFolder,
    uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="Store, sqlite:///FILE or http(s)://...; the run's own by default."),
    ] = None,
    to: Annotated[
        Literal["tensorboard", "wandb-offline"] | None,
        typer.Option(
            metavar="TRACKER",
            help="Write the files of `tensorboard` or `wandb-offline` into the run folder instead; nothing is sent.",
        ),
    ] = None,
) -> None:
    """Send MLflow what it does not have yet, or write another tracker's files; safe to repeat at any time."""
    from pipeline.run.folder import open_run

    run = open_run(run_folder)
    if to is not None:
        from pipeline.tracking.convert.convert import convert

        if uri is not None:
            raise UsageError("--uri names a store of MLflow; leave it out with --to")
        echo(convert(run, to))
        return
    from pipeline.tracking.upload.sync import sync as sync_run

    echo(sync_run(run, uri).message())


@app.command()
def ui(
    run_folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]", help="Run whose store is shown, by folder, name or config; ./mlflow.db by default."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", min=1, max=65535, help="Loopback port; a free one by default.")
    ] = None,
) -> None:
    """Start MLflow's own page for the store, on this machine only, and print its address."""
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.ui import serve

    serve(open_run(run_folder) if run_folder else None, port)
