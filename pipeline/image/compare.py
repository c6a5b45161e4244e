"""What tells two images from each other: versions of packages, lists of files, and the bytes of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.image.apptainer import run_inside
from pipeline.image.record import PACKAGE_LISTS, read_record

_SHOWN = 20
# Type, mode and the target of a link: what can differ in a file besides its bytes. Times do, and mean nothing.
_LIST = ("find", "/", "-xdev", "-not", "-path", "/proc/*", "-printf", "%p %y %m %l\\n")
_SUMS = ("find", "/", "-xdev", "-type", "f", "-exec", "sha256sum", "--zero", "{}", "+")


@dataclass(frozen=True)
class Comparison:
    """How one image differs from another.

    Attributes:
        packages: Those that one has and the other has not, with their versions.
        listed: Files, folders and links that are in one only, or of another kind, mode or target.
        contents: Files in both whose bytes differ.
        files: How many files, folders and links the first holds.
    """

    packages: list[str]
    listed: list[str]
    contents: list[str]
    files: int


def compare(image: Path, other: Path) -> Comparison:
    """Compares two images, whichever of them are files or folders.

    Raises:
        PipelineError: One has no record or cannot be started.
    """
    first, second = (_packages(read_record(file, PACKAGE_LISTS)) for file in (image, other))
    listed, listed_too = _files(image), _files(other)
    sums, sums_too = _sums(image), _sums(other)
    return Comparison(
        packages=_only(first, second, image, other),
        listed=_only(listed, listed_too, image, other),
        contents=sorted(file for file in sums.keys() & sums_too.keys() if sums[file] != sums_too[file]),
        files=len(listed),
    )


def print_comparison(image: Path, other: Path) -> bool:
    """Prints how two images differ; whether they hold the same packages and the same files, bytes aside."""
    found = compare(image, other)
    for what, lines in (("packages", found.packages), ("files", found.listed), ("contents", found.contents)):
        print(f"{what:<13} {f'{len(lines)} differ' if lines else 'the same'}")
        for line in lines[:_SHOWN]:
            print(f"  {line}")
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
    lone = [(entry, image) for entry in first - second] + [(entry, other) for entry in second - first]
    return [f"{entry.rstrip()}: in {where} only" for entry, where in sorted(lone)]
