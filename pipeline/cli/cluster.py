"""The commands of a cluster: submit, status, logs, cancel, check, plan."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.arguments import AllowImageChange, AsJson, ConfigFile, Overrides, RunFolder, RunFolders
from pipeline.errors import EXIT_FAILED, UsageError
from pipeline.text_format import say

if TYPE_CHECKING:
    from pipeline.launch.watch.status import RunStatus

app = typer.Typer()

SiteFile = Annotated[str, typer.Option("--site", metavar="SITE", help="The cluster's YAML file; see slurm/sites.")]


@app.command()
def submit(
    config_file: ConfigFile,
    site_file: SiteFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch scripts without submitting.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="One run per value, as an array; several sweeps are combined."),
    ] = None,
    allow_image_change: AllowImageChange = False,
) -> None:
    """Submit the whole pipeline to Slurm: prepare, then train, then evaluate and report."""
    from pipeline.launch.submit import submit as launch
    from pipeline.launch.submit.summary import summary

    chain = launch.plan_chain(config_file, site_file, overrides or (), sweep or (), allow_image_change)
    if dry_run:
        say(launch.dry_run(chain), end="")
        return
    say(summary(chain, launch.submit(chain) if chain.jobs else []))


@app.command()
def status(
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Run folders, or a folder of them; runs by default.")
    ] = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every five seconds, until Ctrl-C.")] = False,
) -> None:
    """Show the state of runs: step, loss, speed, time left, restarts, goodput, last checkpoint."""
    from pipeline.launch.watch import status_view
    from pipeline.launch.watch.status import find_runs, statuses
    from pipeline.terminal import Terminal

    def refresh() -> list[RunStatus]:
        return statuses(find_runs(paths or ["runs"]))

    # A pipe has no screen width that lines would have to be cut to.
    console = Terminal(width=None if sys.stdout.isatty() else 200)
    if as_json:
        print(json.dumps([found.to_json() for found in refresh()], indent=2))
    elif watch:
        status_view.watch(refresh, console)
    else:
        console.print(status_view.view(refresh()))


@app.command()
def logs(
    run_folder: RunFolder,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose output is printed.")] = 0,
) -> None:
    """Print the output of the jobs of a run: all attempts, in order."""
    from pipeline.launch.watch import logs as job_logs
    from pipeline.launch.watch.status import statuses
    from pipeline.run.folder import open_run

    run = open_run(run_folder)
    if follow:
        pieces = job_logs.follow(run, rank, lambda: statuses([run])[0].state not in ("queued", "running", "unknown"))
    else:
        pieces = job_logs.printed(run, rank)
    for piece in pieces:
        say(piece.replace("\r\n", "\n").replace("\r", "\n"), end="")


@app.command()
def cancel(run_folders: RunFolders) -> None:
    """Cancel the jobs of runs; training saves first, and nothing is requeued."""
    from pipeline.launch.watch.cancel import cancel as cancel_run
    from pipeline.run.folder import open_run

    for run in [open_run(folder) for folder in run_folders]:
        ids = cancel_run(run)
        say(f"{run.path}: " + (f"cancelled job {', '.join(ids)}" if ids else "no job in the queue"))


@app.command()
def check(
    config_file: ConfigFile,
    overrides: Overrides = None,
    site_file: Annotated[
        str | None, typer.Option("--site", metavar="SITE", help="The cluster's YAML file; this machine by default.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2", help="As `pipeline submit` will be given it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check whether a config will work: memory, disk, data, devices, Slurm, image; exit status 1 if not."""
    from pipeline.check.check import run_checks
    from pipeline.check.table import print_checks
    from pipeline.terminal import Terminal

    found = run_checks(config_file, site_file, overrides or (), sweep or ())
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
    else:
        print_checks(found, Terminal())
    if any(one.status == "failed" for one in found):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of nodes.")] = "1,8,64,512",
    device: Annotated[str, typer.Option(help="Name in the table of devices: h100, a100, mi300x, cpu ...")] = "h100",
    per_node: Annotated[int | None, typer.Option(min=1, help="Devices per node; the usual number by default.")] = None,
    intra_gb_per_s: Annotated[float | None, typer.Option(min=0.001, help="Bandwidth inside a node.")] = None,
    inter_gb_per_s: Annotated[float | None, typer.Option(min=0.001, help="Total bandwidth out of a node.")] = None,
    storage_gb_per_s: Annotated[float, typer.Option(min=0.001, help="Total bandwidth of shared storage.")] = 20.0,
    mtbf_node_hours: Annotated[
        float | None, typer.Option(min=0.001, help="Mean hours between failures of a node; 6,334 by default.")
    ] = None,
    restart_s: Annotated[float, typer.Option(min=0, help="Seconds from a failure to the first new step.")] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Estimate a config on many nodes: memory, step time, efficiency, goodput."""
    from pipeline.config.load import load_config
    from pipeline.plan.devices import device_named
    from pipeline.plan.plan import MTBF_NODE_HOURS, Cluster, make_plan
    from pipeline.plan.tables import print_plan
    from pipeline.terminal import Terminal

    found = device_named(device)
    cluster = Cluster(
        found,
        per_node=per_node or found.per_node,
        intra_gb_per_s=intra_gb_per_s or found.intra_gb_per_s,
        inter_gb_per_s=inter_gb_per_s or found.inter_gb_per_s,
        storage_gb_per_s=storage_gb_per_s,
        mtbf_node_hours=mtbf_node_hours or MTBF_NODE_HOURS,
        restart_s=restart_s,
    )
    config = load_config(config_file, overrides or ())
    rows = make_plan(config, _counts(nodes), cluster)
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print_plan(config, rows, cluster, Terminal())


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(re.fullmatch(r" *[1-9][0-9]{0,8} *", part) for part in parts):
        raise UsageError(f"--nodes {text[:60]}: allowed are numbers from 1, separated by commas, for example 1,8,64")
    return [int(part) for part in parts]
