"""The differences between two images: versions of packages, lists of files, contents of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.image.apptainer import run_inside
from pipeline.image.record import PACKAGE_LISTS, read_record
from pipeline.text_format import echo

_SHOWN = 20
# Type, mode and link target. Times differ between any two builds and mean nothing.
_LIST = ("find", "/", "-xdev", "-not", "-path", "/proc/*", "-printf", "%p %y %m %l\\n")
_SUMS = ("find", "/", "-xdev", "-type", "f", "-exec", "sha256sum", "--zero", "{}", "+")


@dataclass(frozen=True)
class Comparison:
    """How one image differs from another."""

    packages: list[str]
    """Packages, with their versions, that only one image has."""
    listed: list[str]
    """Files, folders and links that only one image has with this type, mode and link target."""
    contents: list[str]
    """Files in both images whose bytes differ."""
    files: int
    """Number of files, folders and links in the first image."""


def compare(image: Path, other: Path) -> Comparison:
    """Compares two images, each a SIF file or a sandbox.

    Raises:
        PipelineError: An image has no record or cannot be started.
    """
    first, second = (_packages(read_record(file, PACKAGE_LISTS)) for file in (image, other))
    first_files, second_files = _files(image), _files(other)
    first_sums, second_sums = _sums(image), _sums(other)
    return Comparison(
        packages=_only(first, second, image, other),
        listed=_only(first_files, second_files, image, other),
        contents=sorted(
            file for file in first_sums.keys() & second_sums.keys() if first_sums[file] != second_sums[file]
        ),
        files=len(first_files),
    )


def print_comparison(image: Path, other: Path) -> bool:
    """Prints how two images differ; returns whether their packages and lists of files are the same."""
    found = compare(image, other)
    for what, lines in (("packages", found.packages), ("files", found.listed), ("contents", found.contents)):
        print(f"{what:<13} {f'{len(lines)} differ' if lines else 'the same'}")
        for line in lines[:_SHOWN]:
            echo(f"  {line}")
        if len(lines) > _SHOWN:
            print(f"  and {len(lines) - _SHOWN} more")
    print(f"{found.files:,} files, folders and links in {image}")
    return not found.packages and not found.listed


def _packages(record: dict[str, Any]) -> set[str]:
    return {package for kind in PACKAGE_LISTS for package in record[kind]}


def _files(image: Path) -> set[str]:
    return set(run_inside(image, *_LIST).splitlines())


def _sums(image: Path) -> dict[str, str]:
    entries = (entry.split("  ", 1) for entry in run_inside(image, *_SUMS).split("\0") if entry)
    return {file: digest for digest, file in entries}


def _only(first: set[str], second: set[str], image: Path, other: Path) -> list[str]:
    single = [(entry, image) for entry in first - second] + [(entry, other) for entry in second - first]
    return [f"{entry.rstrip()}: in {where} only" for entry, where in sorted(single)]
