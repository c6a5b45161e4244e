"""The commands of `pipeline devcluster`; thin, like `pipeline/cli/main.py`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.devcluster.settings import Settings

app = typer.Typer(
    help="A real Slurm of several nodes on this machine, for learning and testing. Needs root.", no_args_is_help=True
)

State = Annotated[
    str,
    typer.Option(
        metavar="FOLDER",
        envvar="PIPELINE_DEVCLUSTER",
        help="Folder of everything the cluster writes; `down` removes it.",
    ),
]
Node = Annotated[str, typer.Argument(metavar="NODE", help="Number or name of a node.")]
_DEFAULT_STATE = "build/devcluster"


@app.command()
def up(
    state: State = _DEFAULT_STATE,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, max=16, help="Compute nodes, besides the login host.")] = 3,
) -> None:
    """Start a cluster and print how to use it."""
    from pipeline.devcluster.cluster import up as start
    from pipeline.devcluster.settings import state_folder

    began = time.monotonic()
    settings = start(state_folder(state), nodes)
    print(f"login, {', '.join(settings.nodes)}: up in {time.monotonic() - began:.1f} s. Next, in this shell:")
    where = "" if state == _DEFAULT_STATE else f" --state {shlex.quote(state)}"
    print(f'  eval "$(pipeline devcluster env{where})"    # Slurm\'s commands then use this cluster')
    print("  sinfo")
    print("  pipeline submit configs/demo.yaml --site slurm/sites/devcluster.yaml")
    print(f"  pipeline devcluster down{where}")


@app.command()
def down(state: State = _DEFAULT_STATE) -> None:
    """End the cluster and remove every trace of it; running jobs are lost."""
    from pipeline.devcluster.cluster import down as end
    from pipeline.devcluster.settings import state_folder

    end(state_folder(state))


@app.command()
def status(state: State = _DEFAULT_STATE) -> None:
    """Print the hosts, whether each has power, and its state in Slurm."""
    from pipeline.devcluster.cluster import status as hosts

    for line in hosts(_load(state)):
        print(f"{line.host:<8}{line.address:<12}{'up' if line.up else 'down':<6}{line.slurm}")


@app.command()
def env(state: State = _DEFAULT_STATE) -> None:
    """Print the shell lines that make Slurm's commands use the cluster: eval "$(pipeline devcluster env)"."""
    from pipeline.devcluster.hosts import environment

    for name, value in environment(_load(state)).items():
        print(f"export {name}={shlex.quote(value)}")


@app.command()
def shell(
    state: State = _DEFAULT_STATE,
    host: Annotated[str, typer.Option(metavar="HOST", help="`login`, or the number or name of a node.")] = "login",
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- COMMAND...]", help="What to run; your shell by default.")
    ] = None,
) -> None:
    """Run a command, or an interactive shell, on a host of the cluster."""
    from pipeline.devcluster.hosts import enter
    from pipeline.devcluster.settings import LOGIN, refuse_private

    settings = _load(state)
    where = host if host in settings.hosts else settings.node(host)
    if where != LOGIN:
        refuse_private("the working folder", Path.cwd())
    line = enter(settings, where, command or [os.environ.get("SHELL", "/bin/sh")], Path.cwd())
    sys.stdout.flush()
    os.execvp(line[0], line)


@app.command()
def kill_node(node: Node, state: State = _DEFAULT_STATE) -> None:
    """Cut a node's power: all its processes end at once."""
    from pipeline.devcluster.cluster import kill_node as kill

    settings = _load(state)
    kill(settings, settings.node(node))


@app.command()
def start_node(node: Node, state: State = _DEFAULT_STATE) -> None:
    """Bring a node back up."""
    from pipeline.devcluster.cluster import start_node as start

    settings = _load(state)
    start(settings, settings.node(node))


@app.command()
def restart_controller(state: State = _DEFAULT_STATE) -> None:
    """Restart slurmctld; running jobs continue."""
    from pipeline.devcluster.cluster import restart_controller as restart

    restart(_load(state))


def _load(state: str) -> Settings:
    from pipeline.devcluster.settings import load, state_folder

    return load(state_folder(state))
