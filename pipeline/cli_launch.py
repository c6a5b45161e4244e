"""The commands of a cluster: submit, status, logs, cancel, check, plan; thin, like `cli.py`."""

from __future__ import annotations

import typer

app = typer.Typer()
