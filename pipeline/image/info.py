"""`pipeline image info`: prints what an image was built from and whether it has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, UsageError, listing
from pipeline.image.apptainer import labels
from pipeline.image.build import CONTAINERS, checkout, commit_of
from pipeline.image.record import PACKAGE_LISTS, digest, read_record
from pipeline.image.wheels import lock_digest, locks_of
from pipeline.text_format import echo

_BASE = ("base.name", "base.bootstrap", "base.digest")
_SHOWN = ("accelerator", "architecture", "version", "commit", "lock_sha256", "date", "apptainer", "size_mb", "sha256")
_LABELS = {"org.opencontainers.image.revision": "commit", "pipeline.lock.sha256": "lock_sha256"}


def print_info(image: Path) -> None:
    """Prints the record of an image and how it differs from this checkout.

    Raises:
        UsageError: The image does not exist.
        PipelineError: It has no record, or does not match it.
    """
    if not image.exists():
        raise UsageError(f"{image}: does not exist; build it with `pipeline image build`")
    record = read_record(image, (*_BASE, *_SHOWN, *PACKAGE_LISTS))
    base = record["base"]
    echo(f"{'base':<13} {base['name']} by {base['bootstrap']}, {base['digest']}")
    for key in _SHOWN:
        echo(f"{key:<13} {record[key]}")
    python, system = (len(record[kind]) for kind in PACKAGE_LISTS)
    print(f"{'packages':<13} {python} of Python, {system} of the system")
    for line in _differences_from_checkout(record):
        echo(line)
    problems = _contradictions(image, record)
    if problems:
        raise PipelineError(listing(f"{image}: does not match its record:", problems))
    print("the image matches its record")


def _differences_from_checkout(record: dict[str, Any]) -> list[str]:
    try:
        root = checkout()
    except UsageError:  # installed: there is no checkout to compare with
        return []
    locks = locks_of(record["accelerator"], root / CONTAINERS, record["architecture"])
    here = {"commit": commit_of(root), "lock_sha256": lock_digest(locks)}
    return [f"{key} of this checkout differs: {value}" for key, value in here.items() if record[key] != value]


def _contradictions(image: Path, record: dict[str, Any]) -> list[str]:
    problems = []
    found = digest(image)
    if found != record["sha256"]:
        problems.append(f"its sha256 is {found}: it was changed, signed or damaged after the build")
    said = labels(image)
    for label, key in _LABELS.items():
        if said.get(label) != record[key]:
            problems.append(f"its label {label} is {said.get(label)}: the record belongs to another image")
    return problems
