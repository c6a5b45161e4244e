"""The commands of a cluster: submit, status, logs, cancel, check, plan."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.arguments import (
    AllowImageChange,
    AsJson,
    ConfigFile,
    Overrides,
    RunFolder,
    RunFolders,
    numbers_from,
)
from pipeline.errors import EXIT_FAILED, PipelineError, UsageError, refuse
from pipeline.text_format import echo

if TYPE_CHECKING:
    from pipeline.launch.watch.run_status import RunStatus

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
        typer.Option(
            metavar="KEY=V1,V2|FILE",
            help="One run per value, or per row of a CSV or YAML file, as an array; several sweeps are combined.",
        ),
    ] = None,
    max_parallel: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Runs of a sweep that train at the same time; all by default."),
    ] = None,
    decay_at: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Train at a constant rate, and decay from these steps in runs of their own (optimizer.schedule: wsd).",
        ),
    ] = None,
    allow_image_change: AllowImageChange = False,
) -> None:
    """Submit the whole pipeline to Slurm: prepare, then train, then evaluate and report."""
    from pipeline.check.submission import refuse_failed
    from pipeline.launch.submit import summary
    from pipeline.launch.submit.chain import plan_chain
    from pipeline.launch.submit.submit import submit as submit_chain

    if max_parallel is not None and not sweep:
        raise UsageError("--max-parallel: only together with --sweep; it limits how many of its runs train at a time")
    steps = numbers_from(decay_at, "--decay-at", least=1) if decay_at is not None else []
    chain = plan_chain(config_file, site_file, overrides or (), sweep or (), allow_image_change, max_parallel, steps)
    if dry_run:
        echo(summary.dry_run(chain), end="")
        return
    refuse_failed(chain)
    echo(summary.summary(chain, submit_chain(chain) if any(part.jobs for part in chain.parts) else []))


@app.command()
def status(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Runs by folder, name or config, folders of sweeps or of runs; `runs` by default."
        ),
    ] = None,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every five seconds, until Ctrl-C.")] = False,
) -> None:
    """Show the state of runs: step, loss, speed, time left, restarts, goodput, last checkpoint."""
    from pipeline.launch.watch import status_view
    from pipeline.launch.watch.status import statuses
    from pipeline.run.related import found_runs, read_branches, runs_here
    from pipeline.terminal import Terminal

    problems: list[PipelineError] = []

    def refresh() -> list[RunStatus]:
        runs, problems[:] = found_runs(paths) if paths else (runs_here(), [])
        decays = [branch.run for branch in read_branches(runs[0])] if len(runs) == 1 else []
        return [*statuses(runs), *statuses([run for run in decays if run.config_file.is_file()])]

    # A pipe has no screen width that lines would have to be cut to.
    console = Terminal(width=None if sys.stdout.isatty() else 200)
    if as_json:
        print(json.dumps([found.to_json() for found in refresh()], indent=2))
    elif watch:
        status_view.watch(refresh, console)
    else:
        console.print(status_view.view(refresh()))
    refuse(problems)


@app.command()
def logs(
    run_folder: RunFolder,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep printing until the run has ended.")] = False,
    rank: Annotated[int, typer.Option(metavar="N", min=0, help="Rank whose output is printed.")] = 0,
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
        echo(piece.replace("\r\n", "\n").replace("\r", "\n"), end="")


@app.command()
def cancel(run_folders: RunFolders) -> None:
    """Cancel the jobs of runs; training saves first, and nothing is requeued."""
    from pipeline.launch.slurm.client import SlurmError
    from pipeline.launch.watch.cancel import cancel as cancel_run
    from pipeline.run.related import found_runs

    runs, problems = found_runs(run_folders)
    for run in runs:
        try:
            ids = cancel_run(run)
        except SlurmError:
            raise
        except PipelineError as error:  # a damaged folder
            problems.append(error)
            continue
        echo(f"{run.path}: " + (f"cancelled job {', '.join(ids)}" if ids else "no job in the queue"))
    refuse(problems)


@app.command()
def check(
    config_file: ConfigFile,
    overrides: Overrides = None,
    site_file: Annotated[
        str | None, typer.Option("--site", metavar="SITE", help="The cluster's YAML file; this machine by default.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V1,V2|FILE", help="As `pipeline submit` will be given it.")
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
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Name in the table of devices: h100, a100, mi300x, cpu ...")
    ] = "h100",
    per_node: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Devices per node; the usual number by default.")
    ] = None,
    intra_gb_per_s: Annotated[
        float | None, typer.Option(metavar="GB/S", min=0.001, help="Bandwidth inside a node.")
    ] = None,
    inter_gb_per_s: Annotated[
        float | None, typer.Option(metavar="GB/S", min=0.001, help="Total bandwidth out of a node.")
    ] = None,
    storage_gb_per_s: Annotated[
        float, typer.Option(metavar="GB/S", min=0.001, help="Total bandwidth of shared storage.")
    ] = 20.0,
    mtbf_node_hours: Annotated[
        float | None,
        typer.Option(metavar="HOURS", min=0.001, help="Mean hours between failures of a node; 6,334 by default."),
    ] = None,
    restart_s: Annotated[
        float, typer.Option(metavar="S", min=0, help="Seconds from a failure to the first new step.")
    ] = 300.0,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(metavar="PRICE", min=0, help="What an hour of one device costs, in any currency.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a config on many nodes: memory, step time, efficiency, cost, goodput."""
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
        price_per_device_hour=price_per_gpu_hour,
    )
    config = load_config(config_file, overrides or ())
    rows = make_plan(config, numbers_from(nodes, "--nodes", least=1), cluster)
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print_plan(config, rows, cluster, Terminal())
