"""`pipeline image`: the Apptainer image; thin, like `cli.py`."""

from __future__ import annotations

import typer

app = typer.Typer(help="Build the Apptainer image and look at what is recorded about it.", no_args_is_help=True)
