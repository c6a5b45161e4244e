"""Which files a source has, and what is in them."""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.data_sections import SourceConfig
from pipeline.errors import DataError

FORMATS = ("txt", "jsonl", "parquet")
COMPRESSIONS = ("gz", "zst", "bz2", "xz")


@dataclass(frozen=True)
class SourceFile:
    """A file as it was when the work was planned.

    Attributes:
        path: As the glob of the config gave it.
        format: `txt`, `jsonl` or `parquet`.
        compression: `gz`, `zst`, `bz2`, `xz` or None.
        size: Bytes on the disk.
        stamp: Modification and change time in nanoseconds and the inode: what a changed file cannot keep.
    """

    path: str
    format: str
    compression: str | None
    size: int
    stamp: tuple[int, int, int]


def find_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a source, sorted by name.

    Raises:
        DataError: A pattern matches nothing or a folder, a file cannot be read, or its format cannot be told.
    """
    paths: set[str] = set()
    for pattern in source.paths:
        paths.update(_matches(pattern, source))
    return [_describe(path, source) for path in sorted(paths)]


def _matches(pattern: str, source: SourceConfig) -> list[str]:
    """The files of a pattern; one that is the name of a file means that file, with whatever brackets are in it."""
    found = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207 - keeps the spelling
    files = [path for path in found if not Path(path).is_dir()]
    if files:
        return files
    if found:
        raise DataError(
            f"data.sources: {source.name}: {pattern!r} names a folder, not files; name those in it, as "
            f"{str(Path(pattern) / '**' / '*.jsonl')!r} does"
        )
    raise DataError(
        f"data.sources: {source.name}: {pattern!r} matches no file (looked from {Path.cwd()}); "
        "correct the path, or fetch the text first"
    )


def _describe(path: str, source: SourceConfig) -> SourceFile:
    suffixes = [s[1:].lower() for s in Path(path).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    kind = source.format if source.format != "auto" else (suffixes[-1] if suffixes else "")
    if kind not in FORMATS:
        raise DataError(
            f"{path}: the name does not tell what it holds (source {source.name}); set `format` of the source to "
            f"one of {', '.join(FORMATS)}, or name the files .txt, .jsonl or .parquet, "
            f"each also .{', .'.join(COMPRESSIONS)}"
        )
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise DataError(
                f"{path}: of source {source.name} is no regular file (a pipe, a socket or a device?), and sources are "
                "read more than once; copy its content to a file, or leave it out of `paths`"
            )
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: the file of source {source.name} cannot be read ({error.strerror})") from error
    return SourceFile(path, kind, compression, found.st_size, _stamp(found))


def stamp_of(path: str) -> tuple[int, int, int] | None:
    """What no change of a file leaves as it was; None if the file is gone."""
    try:
        return _stamp(Path(path).stat())
    except FileNotFoundError:
        return None


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_ino
