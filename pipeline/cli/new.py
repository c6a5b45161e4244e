"""The commands that begin an experiment: new, schema."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.errors import UsageError
from pipeline.text_format import echo

_DEFAULT = "demo"


def new(
    config_file: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The file to write; it names the run.")],
    like: Annotated[
        str | None, typer.Option(metavar="EXAMPLE", help="demo, 135m, 350m, 1b or 8b; demo by default.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="hf:FOLDER", help="Continue from these open weights.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(metavar="SITE.yaml", help="Also write a site file, to be adapted to the cluster.")
    ] = None,
) -> None:
    """Write a commented config, and a site file; nothing is overwritten."""
    from pathlib import Path

    from pipeline.commands.new import new_config, new_config_from, new_site, refuse_existing

    if like is not None and source is not None:
        raise UsageError("--like and --from: give one of them; --from takes the example of the nearest size by itself")
    if source is not None and not source.startswith("hf:"):
        raise UsageError(f"--from {source}: name a model folder as hf:FOLDER")
    files = [Path(name) for name in (config_file, site) if name is not None]
    refuse_existing(files)
    if source is None:
        new_config(files[0], like or _DEFAULT)
        echo(f"{config_file}: from the example {like or _DEFAULT}")
    else:
        example = new_config_from(files[0], Path(source.removeprefix("hf:")))
        echo(f"{config_file}: continues from {source}; the rest is from the example {example}")
    if site is not None:
        new_site(files[1])
        echo(f"{site}: from the example of a GPU cluster; adapt partitions, nodes and memory")
    echo(f"next: adapt {' and '.join(map(str, files))}, then\n  {_next(config_file, site)}")


def _next(config_file: str, site: str | None) -> str:
    return f"pipeline run {config_file}" if site is None else f"pipeline check {config_file} --site {site}"


def schema(
    kind: Annotated[
        Literal["config", "site"], typer.Argument(metavar="[config|site]", help="Of which file; config by default.")
    ] = "config",
) -> None:
    """Print the JSON schema with which an editor completes and checks a config or a site file."""
    import json

    from pipeline.config.load import CONFIG
    from pipeline.launch.site import SITE

    vocabulary = CONFIG if kind == "config" else SITE
    print(json.dumps(vocabulary.json_schema(), indent=2))
