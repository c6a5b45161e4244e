"""IMAGE.json, the record beside an image: what it was built from."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.files import read_json, sha256_file, write_json

# Apptainer.def installs Python and the project here; its %environment names the same folder.
IMAGE_HOME = Path("/opt/hpc-pipeline")
PACKAGE_LISTS = ("python_packages", "system_packages")


def record_file(image: Path) -> Path:
    """Returns the path of an image's record, which lies beside it: `pipeline-cpu.sif.json`."""
    return image.with_name(f"{image.name}.json")


def read_record(image: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """Returns the record of an image, which must hold these dotted keys besides the checksum.

    Raises:
        PipelineError: The record is missing or damaged.
    """
    file = record_file(image)
    if not file.exists():
        raise PipelineError(
            f"{image}: has no record ({file.name} beside it); copy the record along with the image, or build the image "
            "again with `pipeline image build`"
        )
    record = read_json(file)
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), str):
        raise PipelineError(f"{file}: not the record of an image; build the image again with `pipeline image build`")
    missing = [key for key in keys if _at(record, key) is None]
    if missing:
        raise PipelineError(
            f"{file}: the record of an image lacks {', '.join(missing)}; copy the complete record along with the "
            "image, or build the image again with `pipeline image build`"
        )
    return record


def _at(record: dict[str, Any], key: str) -> Any:
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def write_record(image: Path, record: dict[str, Any]) -> None:
    """Publishes the record of a finished image, with its size and checksum."""
    write_json(record_file(image), {**record, "size_mb": round(_bytes(image) / 1e6, 1), "sha256": digest(image)})


def digest(image: Path) -> str:
    """Returns the SHA-256 of a SIF file; of a sandbox, that of its files' names, modes, links and contents."""
    if image.is_file():
        return sha256_file(image)
    total = hashlib.sha256()
    for path in _files(image):
        mode = path.lstat().st_mode
        content = str(path.readlink()) if path.is_symlink() else sha256_file(path) if stat.S_ISREG(mode) else ""
        total.update(f"{path.relative_to(image)}\0{mode:o}\0{content}\n".encode())
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent) / name for name in sorted([*files, *folders]))


def _bytes(image: Path) -> int:
    return image.stat().st_size if image.is_file() else sum(path.lstat().st_size for path in _files(image))
