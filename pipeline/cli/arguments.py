"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from pipeline.errors import UsageError

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="The experiment's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, for example `train.max_iters=100`."),
]
RUN_HELP = "Its folder, for example `runs/demo`, its name, or its config."
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help=RUN_HELP)]
RunFolders = Annotated[list[str], typer.Argument(metavar="RUN...", help=f"Runs, or folders of sweeps. {RUN_HELP}")]
AllowImageChange = Annotated[
    bool, typer.Option("--allow-image-change", help="Resume in another image than the run was trained in.")
]
LARGEST_SEED = 2**63 - 1
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def numbers_from(text: str, option: str, least: int) -> list[int]:
    """Returns the numbers of an option such as `1,8,64`.

    Args:
        text: Its value.
        option: Its name, for the message.
        least: The smallest number that is allowed.

    Raises:
        UsageError: It is something else.
    """
    parts = text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,9} *", part) and int(part) >= least for part in parts):
        example = ",".join(str(least + n) for n in (0, 7, 63))
        raise UsageError(
            f"{option} {text[:60]}: allowed are numbers from {least}, separated by commas, for example {example}"
        )
    return [int(part) for part in parts]
