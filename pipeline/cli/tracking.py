"""The commands that show what a run recorded: report, sync, ui."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.arguments import RunFolder, RunFolders
from pipeline.text_format import say

app = typer.Typer()


@app.command()
def report(
    run_folders: RunFolders,
    output: Annotated[str | None, typer.Option(help="HTML file; report.html in the first RUN by default.")] = None,
) -> None:
    """Write one self-contained HTML page: curves, goodput, restarts, config, provenance, samples."""
    from pathlib import Path

    from pipeline.run.folder import open_run
    from pipeline.tracking.report.report import write_report
    from pipeline.tracking.upload.sync import sync_quietly

    runs = [open_run(folder) for folder in run_folders]
    say(write_report(runs, Path(output) if output else None))
    if output is None:  # a page elsewhere is not an artifact of the run
        sync_quietly(runs[0])


@app.command()
def sync(
    run_folder: RunFolder,
    uri: Annotated[
        str | None, typer.Option(help="Store, sqlite:///FILE or http(s)://...; the run's own by default.")
    ] = None,
) -> None:
    """Send MLflow what it does not have yet; safe to repeat at any time."""
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.sync import sync as sync_run

    say(sync_run(open_run(run_folder), uri).message())


@app.command()
def ui(
    run_folder: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run whose store is shown; ./mlflow.db by default.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Loopback port; a free one by default.")] = None,
) -> None:
    """Start MLflow's own page for the store, on this machine only, and print its address."""
    from pipeline.run.folder import open_run
    from pipeline.tracking.upload.ui import serve

    serve(open_run(run_folder) if run_folder else None, port)
