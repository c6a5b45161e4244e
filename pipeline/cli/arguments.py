"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, for example `train.max_iters=100`."),
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="The run folder, for example `runs/demo`.")]
RunFolders = Annotated[list[str], typer.Argument(metavar="RUN...", help="One or more run folders.")]
AllowImageChange = Annotated[
    bool, typer.Option("--allow-image-change", help="Resume in another image than the run was trained in.")
]
LARGEST_SEED = 2**63 - 1
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
