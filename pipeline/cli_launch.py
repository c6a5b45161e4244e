"""The commands of a cluster: submit, status, logs, cancel, check, plan; thin, like `cli.py`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, `train.max_iters=100` say.")
]
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
