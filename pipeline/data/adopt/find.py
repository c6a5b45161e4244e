"""Finds the token files of each source and opens them by their format."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.adopt.megatron import open_megatron
from pipeline.data.adopt.raw import open_npy, open_olmo, open_raw
from pipeline.data.adopt.token_file import TokenFile
from pipeline.data.read.sources import identity_of
from pipeline.errors import DataError, UsageError

FormatName = Literal["megatron", "raw", "npy", "olmo"]

NEED_DTYPE = ("raw", "olmo")
"""The formats that do not say the type of a token."""

_SUFFIXES = {"megatron": ".bin", "raw": ".bin", "npy": ".npy", "olmo": ".npy"}
_DEFAULT_SOURCE = "tokens"


@dataclass
class SourceFiles:
    """The files of one source, in order."""

    train: list[TokenFile]
    validation: list[TokenFile]


def find_sources(
    format_name: FormatName, paths: Sequence[str], validation: Sequence[str], dtype: str | None
) -> dict[str, SourceFiles]:
    """Returns the files of each source by its name.

    Args:
        format_name: What they are.
        paths: Files, folders or globs, each as `PATH` or `NAME=PATH`.
        validation: The same, for validation only.
        dtype: The type of a token, for formats that do not say it.

    Raises:
        UsageError: A path matches nothing, or `dtype` is missing or not wanted.
        DataError: A file is damaged, or occurs twice.
    """
    needs_dtype = format_name in NEED_DTYPE
    if needs_dtype != (dtype is not None):
        reason = "must be given, the files do not say it" if needs_dtype else "is given, but the files say it"
        raise UsageError(f"--dtype: {reason} (format {format_name})")
    found: dict[str, SourceFiles] = {}
    owners: dict[tuple[int, ...], str] = {}
    for training, given in ((True, paths), (False, validation)):
        for text in given:
            name, pattern = _named(text)
            source = found.setdefault(name, SourceFiles([], []))
            for path in _matches(pattern, _SUFFIXES[format_name]):
                identity = identity_of(path)
                if identity in owners:
                    raise DataError(f"{path}: is named twice, by {owners[identity]!r} and by {text!r}; name it once")
                owners[identity] = text
                (source.train if training else source.validation).append(_open(format_name, path, dtype))
    for name, source in found.items():
        if not source.train and not any(other.train for other in found.values()):
            raise UsageError(f"source {name}: has files for validation only; name some to train on")
    return found


def _named(text: str) -> tuple[str, str]:
    """Returns the name of the source and the path of `NAME=PATH`."""
    name, equals, path = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        return _DEFAULT_SOURCE, text
    return name, path


def _matches(pattern: str, suffix: str) -> list[Path]:
    """Returns the files that a path names."""
    place = Path(pattern)
    if place.is_dir():
        names = sorted(str(path) for path in place.rglob(f"*{suffix}"))
    elif place.exists() or not Path(f"{pattern}{suffix}").exists():
        names = [pattern] if place.exists() else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 - may be absolute
    else:
        names = [f"{pattern}{suffix}"]  # Megatron-LM names its datasets without the suffix
    if not names:
        raise UsageError(f"{pattern}: matches no file (*{suffix} in a folder); correct the path")
    return [Path(name) for name in names]


def _open(format_name: FormatName, path: Path, dtype: str | None) -> TokenFile:
    if format_name == "megatron":
        found = open_megatron(path)
    elif format_name == "npy":
        found = open_npy(path)
    else:
        found = (open_olmo if format_name == "olmo" else open_raw)(path, np.dtype(dtype))
    # Without links in its name: its folder is what the user will name, and no link may lead out of it.
    return replace(found, path=path.resolve())
