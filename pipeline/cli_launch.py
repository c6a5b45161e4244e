"""The commands of a cluster: submit, status, logs, cancel, check, plan; thin, like `cli.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.launch.status import RunStatus

app = typer.Typer()

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, `train.max_iters=100` say.")
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The run folder, `runs/demo` say.")]
SiteFile = Annotated[str, typer.Option("--site", metavar="SITE", help="The cluster's YAML file; see slurm/sites.")]


@app.command()
def submit(
    config_file: ConfigFile,
    site_file: SiteFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch scripts; submit nothing.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="A run for every value, as an array; several options are combined."),
    ] = None,
) -> None:
    """Submit the whole pipeline to Slurm: prepare, then train, then evaluate and report."""
    from pipeline.launch import submit as launch
    from pipeline.launch.summary import summary

    chain = launch.plan_chain(config_file, site_file, overrides or (), sweep or ())
    if dry_run:
        print(launch.dry_run(chain), end="")
        return
    print(summary(chain, launch.submit(chain) if chain.jobs else []))


@app.command()
def status(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Run folders, or a folder of them; runs otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every five seconds, until Ctrl-C.")] = False,
) -> None:
    """Show how runs are: state, step, loss, speed, time left, restarts, goodput, last checkpoint."""
    import json
    import sys

    from rich.console import Console

    from pipeline.launch import status_view
    from pipeline.launch.status import find_runs, statuses

    def look() -> list[RunStatus]:
        return statuses(find_runs(paths or ["runs"]))

    # Into a pipe nothing is cut off to fit a screen that is not there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if as_json:
        print(json.dumps([found.as_json() for found in look()], indent=2))
    elif watch:
        status_view.watch(look, console)
    else:
        console.print(status_view.view(look()))


@app.command()
def logs(
    run_folder: RunFolder,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
) -> None:
    """Print what the jobs of a run have printed: all attempts, in order."""
    import sys

    from pipeline.launch import logs as job_logs
    from pipeline.launch.status import statuses
    from pipeline.run import open_run

    run = open_run(run_folder)
    if follow:
        pieces = job_logs.follow(run, rank, lambda: statuses([run])[0].state not in ("queued", "running"))
    else:
        pieces = job_logs.printed(run, rank)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


@app.command()
def cancel(run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")]) -> None:
    """Take the jobs of runs out of the queue; training saves first, and nothing is requeued."""
    from pipeline.launch.cancel import cancel as cancel_run
    from pipeline.run import open_run

    for run in [open_run(folder) for folder in run_folders]:
        ids = cancel_run(run)
        print(f"{run.path}: " + (f"cancelled job {', '.join(ids)}" if ids else "nothing of it is in the queue"))
