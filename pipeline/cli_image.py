"""`pipeline image`: the Apptainer image; thin, like `cli.py`."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Build the Apptainer image and look at what is recorded about it.", no_args_is_help=True)


@app.command()
def build(
    base: Annotated[
        str,
        typer.Option(metavar="cpu|cuda|rocm|FILE", help="What it is built on: one of containers/*.args, or a file."),
    ] = "cpu",
    sandbox: Annotated[bool, typer.Option("--sandbox", help="A folder in place of a SIF file.")] = False,
) -> None:
    """Build an image of this checkout into build/images and test it."""
    from pipeline.launch.image_build import build_image

    print(build_image(base, sandbox))


@app.command()
def info(image: Annotated[str, typer.Argument(metavar="IMAGE", help="A SIF file or a sandbox folder.")]) -> None:
    """Print what an image was built from; status 1 if it is not what its record says."""
    from pathlib import Path

    from pipeline.launch.image_info import print_info

    print_info(Path(image))
