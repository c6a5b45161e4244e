"""Memory maps of shards: as many as the machine allows at a time, and the remaining shards on each use."""

from __future__ import annotations

import contextlib
import errno
import resource
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.data.manifest import Shard
from pipeline.errors import DataError
from pipeline.files import naming

# Each mapping takes an open file and one of the kernel's 65,530 map entries.
MOST_MAPS = 8192

# Half of the open files are left for checkpoints, sockets and libraries.
_SHARE = 2
_OTHER_FILES = 256

_Part = Literal["tokens", "index"]
_REFUSALS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.EAGAIN})


def open_files_for(shards: int) -> int:
    """Returns the open files that a process needs to keep all of so many shards mapped."""
    return _SHARE * min(shards, MOST_MAPS) + _OTHER_FILES


def mapped(file: Path, dtype: str | np.dtype[Any], offset: int = 0, count: int | None = None) -> npt.NDArray[Any]:
    """Maps a file of numbers, from a byte on, all of it or so many of them.

    Raises:
        DataError: It cannot be mapped, or is shorter.
    """
    if count == 0:
        return np.zeros(0, dtype)
    try:
        with naming(file, "cannot be mapped", error=DataError):
            return np.memmap(file, dtype, "r", offset, None if count is None else (count,))
    except ValueError as error:
        raise DataError(f"{file}: is shorter than it was ({error})") from error


class ShardMaps:
    """Maps the shards of a dataset; drops the oldest maps where the machine refuses another one.

    Args:
        tokens_in: The folder of the token files.
        indices_in: The folder of the documents' offsets.
        dtype: Type of the stored tokens.
        shards: Number of shards that will be read.
    """

    def __init__(self, tokens_in: Path, indices_in: Path, dtype: np.dtype[Any], shards: int) -> None:
        self._tokens_in = tokens_in
        self._indices_in = indices_in
        self._dtype = dtype
        self._most = max(1, min(MOST_MAPS, _open_files(open_files_for(shards)) // _SHARE))
        self._maps: dict[tuple[Shard, _Part], npt.NDArray[Any]] = {}

    def tokens(self, shard: Shard) -> npt.NDArray[Any]:
        """Returns the tokens of a shard; hold on to the array only as long as it is being read.

        Raises:
            DataError: The shard cannot be read or mapped.
        """
        return self._mapped(shard, "tokens")

    def document_begins(self, shard: Shard, first: int, count: int) -> npt.NDArray[np.int64]:
        """Returns which of the tokens `[first, first + count)` of a shard begin a document, by its index.

        Raises:
            DataError: The index cannot be read or mapped.
        """
        offsets = self._mapped(shard, "index")
        low, high = np.searchsorted(offsets, np.array([first, first + count], np.uint64)).tolist()
        return offsets[low:high].astype(np.int64)

    def _mapped(self, shard: Shard, part: _Part) -> npt.NDArray[Any]:
        found = self._maps.get((shard, part))
        if found is None:
            self._drop_to(self._most - 1)
            found = self._maps[shard, part] = self._map(shard, part)
        return found

    def _map(self, shard: Shard, part: _Part) -> npt.NDArray[Any]:
        file = self._tokens_in / shard.file if part == "tokens" else self._indices_in / shard.index
        while True:
            try:
                # A plain ndarray view: slicing an np.memmap costs ten times as much.
                if part == "tokens":
                    return np.asarray(np.memmap(file, self._dtype, "r", shard.offset, (shard.tokens,)))
                return np.asarray(np.memmap(file, "<u8", "r", 0, (shard.documents + 1,)))
            except ValueError as error:
                raise DataError(f"{file}: is shorter than the manifest says ({error})") from error
            except OSError as error:
                if error.errno not in _REFUSALS or not self._maps:
                    raise _refused(file, error) from error
                self._most = max(1, len(self._maps) * 3 // 4)
                self._drop_to(self._most - 1)

    def _drop_to(self, count: int) -> None:
        while len(self._maps) > count:
            del self._maps[next(iter(self._maps))]


def _refused(file: Path, error: OSError) -> DataError:
    why = error.strerror or str(error)
    if error.errno not in _REFUSALS:
        return DataError(f"{file}: the shard cannot be read ({why})")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return DataError(
        f"{file}: the shard cannot be mapped ({why}), though no other shard is mapped any longer; "
        f"this process may open {soft} files (hard limit {hard}): raise the limits (ulimit -n, ulimit -v), or the "
        "memory of the job"
    )


def _open_files(wanted: int) -> int:
    """Raises the soft limit of open files to what is wanted, as far as the hard limit allows; returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    if soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # then fewer shards stay mapped
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return most
    return soft
