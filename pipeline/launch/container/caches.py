"""Where libraries inside a container keep what they compile: there is no home, and the image is read-only."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.run.private import make_private


def cache_folder(scratch: Path | None) -> Path:
    """Returns the folder of this user below the node's scratch folder."""
    return (scratch or Path("/tmp")) / f"pipeline-cache-{os.getuid()}"


def make_cache_folder(scratch: Path | None) -> None:
    """Creates the folder on this node, before a container uses it.

    Raises:
        UsageError: Others own it or may enter it: its name is known, and in `/tmp` anyone can be first.
    """
    cure = "set `scratch` of the site to a folder of yours"
    make_private(cache_folder(scratch), "what libraries compile", cure)


def cache_variables(scratch: Path | None) -> dict[str, str]:
    """Returns the variables that name the folder inside."""
    folder = cache_folder(scratch)
    return {"XDG_CACHE_HOME": str(folder), "MPLCONFIGDIR": str(folder / "matplotlib")}
