"""The commands of a cluster: submit, status, logs, cancel, check, plan; thin, like `cli.py`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from pipeline.launch.watch.status import RunStatus

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
    allow_image_change: Annotated[
        bool, typer.Option("--allow-image-change", help="Resume in another image than the run was trained in.")
    ] = False,
) -> None:
    """Submit the whole pipeline to Slurm: prepare, then train, then evaluate and report."""
    from pipeline.launch.submit import submit as launch
    from pipeline.launch.submit.summary import summary

    chain = launch.plan_chain(config_file, site_file, overrides or (), sweep or (), allow_image_change)
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

    from pipeline.launch.watch import status_view
    from pipeline.launch.watch.status import find_runs, statuses

    def look() -> list[RunStatus]:
        return statuses(find_runs(paths or ["runs"]))

    # Into a pipe nothing is cut off to fit a screen that is not there.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    if as_json:
        print(json.dumps([found.to_json() for found in look()], indent=2))
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

    from pipeline.launch.watch import logs as job_logs
    from pipeline.launch.watch.status import statuses
    from pipeline.run.folder import open_run

    run = open_run(run_folder)
    if follow:
        pieces = job_logs.follow(run, rank, lambda: statuses([run])[0].state not in ("queued", "running", "unknown"))
    else:
        pieces = job_logs.printed(run, rank)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()


@app.command()
def cancel(run_folders: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")]) -> None:
    """Take the jobs of runs out of the queue; training saves first, and nothing is requeued."""
    from pipeline.launch.watch.cancel import cancel as cancel_run
    from pipeline.run.folder import open_run

    for run in [open_run(folder) for folder in run_folders]:
        ids = cancel_run(run)
        print(f"{run.path}: " + (f"cancelled job {', '.join(ids)}" if ids else "nothing of it is in the queue"))


@app.command()
def check(
    config_file: ConfigFile,
    overrides: Overrides = None,
    site_file: Annotated[
        str | None, typer.Option("--site", metavar="SITE", help="The cluster's YAML file; this machine without it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list, for programs.")] = False,
) -> None:
    """Say whether a config will work: memory, disk, data, devices, Slurm, image; exit status 1 if not."""
    from rich.console import Console

    from pipeline.check.check import run_checks
    from pipeline.check.table import print_checks

    found = run_checks(config_file, site_file, overrides or ())
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
    else:
        print_checks(found, Console(highlight=False))
    if any(one.status == "failed" for one in found):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    config_file: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of nodes.")] = "1,8,64,512",
    device: Annotated[str, typer.Option(help="From the table of devices: h100, a100, mi300x, cpu ...")] = "h100",
    per_node: Annotated[int | None, typer.Option(min=1, help="Devices a node; the device's usual node's.")] = None,
    intra_gb_per_s: Annotated[float | None, typer.Option(min=0.001, help="Between devices of a node.")] = None,
    inter_gb_per_s: Annotated[float | None, typer.Option(min=0.001, help="From a node to others, in all.")] = None,
    storage_gb_per_s: Annotated[float, typer.Option(min=0.001, help="Of the shared file system, in all.")] = 20.0,
    mtbf_node_hours: Annotated[
        float | None, typer.Option(min=0.001, help="Hours until a node fails; 6,334 as published for Llama 3.")
    ] = None,
    restart_s: Annotated[float, typer.Option(min=0, help="Seconds from a failure to the first new step.")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what a config needs and reaches on many nodes: memory, step time, efficiency, goodput."""
    from rich.console import Console

    from pipeline.config.load import load_config
    from pipeline.plan.devices import device_named
    from pipeline.plan.plan import MTBF_NODE_HOURS, Cluster, make_plan
    from pipeline.plan.tables import print_plan

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
        print_plan(config, rows, cluster, Console(highlight=False))


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--nodes {text}: numbers from 1 on, separated by commas, `1,8,64` say")
    return [int(part) for part in parts]
