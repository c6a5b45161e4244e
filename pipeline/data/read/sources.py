"""The files of a source: found, described, and recognised again."""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pipeline.config.data_sections import SourceConfig
from pipeline.errors import DataError
from pipeline.files import naming

FORMATS = tuple(name for name in get_args(SourceConfig.model_fields["format"].annotation) if name != "auto")
# What such files are called elsewhere: C4 and Dolma have `.json.gz`.
_OTHER_NAMES = {"json": "jsonl", "ndjson": "jsonl"}
COMPRESSIONS = ("gz", "zst", "bz2", "xz")


@dataclass(frozen=True, slots=True)  # there may be a million
class SourceFile:
    """A file as it was when the work was planned."""

    path: str
    """As the glob of the config gave it."""
    format: str
    """`txt`, `jsonl`, `parquet` or `arrow`."""
    compression: str | None
    """`gz`, `zst`, `bz2`, `xz` or None."""
    size: int
    """Bytes on disk."""
    stamp: tuple[int, int, int]
    """Modification and change time in nanoseconds and the inode: a changed file differs in one of them."""


def find_files(source: SourceConfig) -> list[SourceFile]:
    """Returns the files of a source, sorted by name.

    Raises:
        DataError: A pattern matches nothing or a folder, a file cannot be read, or its format is unknown.
    """
    paths: set[str] = set()
    for pattern in source.paths:
        paths.update(_matches(pattern, source))
    return [_describe(path, source) for path in sorted(paths)]


def _matches(pattern: str, source: SourceConfig) -> list[str]:
    """Returns the files of a pattern; the name of an existing file means that file, even with brackets in it."""
    found = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207 - keeps the spelling
    files = [path for path in found if not Path(path).is_dir()]
    if files:
        return files
    if found:
        raise DataError(
            f"data.sources: {source.name}: {pattern!r} matches folders, not files; "
            f"give a pattern for the files in them, for example {str(Path(pattern) / '**' / '*.jsonl')!r}"
        )
    raise DataError(
        f"data.sources: {source.name}: {pattern!r} matches no file (searched from {Path.cwd()}); "
        "correct the path, or fetch the text first"
    )


def _describe(path: str, source: SourceConfig) -> SourceFile:
    suffixes = [s[1:].lower() for s in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    suffix = suffixes[-1] if suffixes else ""
    kind = source.format if source.format != "auto" else _OTHER_NAMES.get(suffix, suffix)
    if kind not in FORMATS:
        raise DataError(
            f"{path}: the name does not show the format (source {source.name}); set `format` of the source to "
            f"one of {', '.join(FORMATS)}, or let the name end in .{', .'.join(FORMATS)}, "
            f"optionally followed by .{', .'.join(COMPRESSIONS)}"
        )
    if kind == "txt" and source.where is not None:
        raise DataError(f"{path}: a text file has no fields for `where` of source {source.name}; remove one of the two")
    with naming(path, f"the file of source {source.name} cannot be read", error=DataError):
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(
                f"{path}: the file of source {source.name} is not a regular file (a pipe, a socket or a device?), and "
                "sources are read more than once; copy its content to a file, or leave it out of `paths`"
            )
        with Path(path).open("rb"):
            pass
    return SourceFile(path, kind, compression, found.st_size, _stamp(found))


def refuse_undecodable_name(path: str) -> None:
    """Raises DataError if a dataset cannot record the name of a file."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise DataError(
            f"{shown}: the file's name is not UTF-8, the encoding of a dataset's records; rename the file"
        ) from error


def stamp_of(path: str) -> tuple[int, int, int] | None:
    """Returns what every change of a file changes; None if the file is gone."""
    try:
        return _stamp(Path(path).stat())
    except FileNotFoundError:
        return None


def identity_of(path: str | Path) -> tuple[int, ...]:
    """Returns what all names of a file share, and no two files: links, hard ones too, and mounts are names of one.

    Raises:
        DataError: The file is gone.
    """
    with naming(path, "cannot be read", error=DataError):
        found = Path(path).stat()
    # Not the inode alone: some network file systems give one to two files.
    return found.st_dev, found.st_size, *_stamp(found)


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
