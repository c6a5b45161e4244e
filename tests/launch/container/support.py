"""Images with the header of a SIF file or the folder of a sandbox and no content; commands and binds of a job."""

from __future__ import annotations

import platform
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.launch.container.binds import check_visible
from pipeline.launch.container.command import container_argv
from pipeline.launch.site import SiteContainer
from pipeline.run.folder import run_for

HERE = {"x86_64": b"02", "aarch64": b"04"}[platform.machine()]
OTHER_ARCHITECTURE = b"11"


def sif(path: Path, architecture: bytes = HERE, content: bytes = b"") -> Path:
    """Writes a file with the header of a SIF file."""
    header = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0" + architecture + b"\0"
    path.write_bytes(header + content)
    return path


def sandbox(path: Path) -> Path:
    """Creates a sandbox of one file and one link."""
    (path / ".singularity.d").mkdir(parents=True)
    (path / "file").write_text("content")
    (path / "link").symlink_to("file")
    return path


def config(*overrides: str) -> Config:
    """Loads the config of the working folder."""
    return load_config("config.yaml", overrides)


def argv(loaded: Config, site: SiteContainer | None = None, **more: object) -> list[str]:
    """Returns the command of a rank."""
    given = {"environment": {}, "code": None, **more}
    return container_argv(loaded, site or SiteContainer(), run_for(loaded), ["pipeline", "train", "c.yaml"], **given)  # type: ignore[arg-type]


def bound(command: list[str]) -> list[str]:
    """Returns the binds of a command."""
    return [command[i + 1] for i, part in enumerate(command) if part == "--bind"]


def problems(loaded: Config, site: SiteContainer | None = None) -> list[str]:
    """Returns the paths that a job of this config would not see."""
    return check_visible(loaded, site or SiteContainer(), run_for(loaded))
