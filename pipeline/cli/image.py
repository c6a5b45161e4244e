"""The commands of the Apptainer image: image build, image info."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Build the Apptainer image and show what is recorded about it.", no_args_is_help=True)


@app.command()
def build(
    base: Annotated[
        str,
        typer.Option(metavar="cpu|cuda|rocm|FILE", help="Base of the image: one of containers/*.args, or a file."),
    ] = "cpu",
    sandbox: Annotated[bool, typer.Option("--sandbox", help="Build a folder instead of a SIF file.")] = False,
) -> None:
    """Build an image of this checkout into build/images and test it."""
    from pipeline.image.build import build_image

    print(build_image(base, sandbox))


@app.command()
def info(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A SIF file or a sandbox folder.")],
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="An image to compare with.")] = None,
) -> None:
    """Print what an image was built from; exit status 1 if it differs from its record.

    With OTHER, print how their packages and files differ; exit status 1 if they differ in more than bytes of files.
    """
    from pathlib import Path

    from pipeline.image.compare import print_comparison
    from pipeline.image.info import print_info

    print_info(Path(image))
    if other is not None and not print_comparison(Path(image), Path(other)):
        raise typer.Exit(1)
