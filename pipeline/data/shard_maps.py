"""Memory maps of shards: as many as the machine allows at a time, and the remaining shards on each use."""

from __future__ import annotations

import contextlib
import errno
import resource
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import DataError

# Each mapping takes an open file and one of the kernel's 65,530 map entries.
MOST_MAPS = 8192

# Half of the open files are left for checkpoints, sockets and libraries.
_SHARE = 2
_OTHER_FILES = 256

_REFUSALS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EPERM, errno.EAGAIN})


def open_files_for(shards: int) -> int:
    """Returns the open files that a process needs to keep all of so many shards mapped."""
    return _SHARE * min(shards, MOST_MAPS) + _OTHER_FILES


class ShardMaps:
    """Maps the shards of a dataset; drops the oldest maps where the machine refuses another one.

    Args:
        folder: The dataset folder.
        dtype: Type of the stored tokens.
        shards: Number of shards that will be read.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], shards: int) -> None:
        self._folder = folder
        self._dtype = dtype
        self._most = max(1, min(MOST_MAPS, _open_files(open_files_for(shards)) // _SHARE))
        self._maps: dict[str, npt.NDArray[Any]] = {}

    def tokens(self, file: str) -> npt.NDArray[Any]:
        """Returns the tokens of a shard; hold on to the array only as long as it is being read.

        Raises:
            DataError: The shard cannot be read or mapped.
        """
        found = self._maps.get(file)
        if found is None:
            self._drop_to(self._most - 1)
            found = self._maps[file] = self._map(file)
        return found

    def _map(self, file: str) -> npt.NDArray[Any]:
        while True:
            try:
                # A plain ndarray view: slicing an np.memmap costs ten times as much.
                return np.asarray(np.memmap(self._folder / file, self._dtype, mode="r"))
            except OSError as error:
                if error.errno not in _REFUSALS or not self._maps:
                    raise self._refused(file, error) from error
                self._most = max(1, len(self._maps) * 3 // 4)
                self._drop_to(self._most - 1)

    def _drop_to(self, count: int) -> None:
        while len(self._maps) > count:
            del self._maps[next(iter(self._maps))]

    def _refused(self, file: str, error: OSError) -> DataError:
        why = error.strerror or str(error)
        if error.errno not in _REFUSALS:
            return DataError(f"{self._folder / file}: the shard cannot be read ({why})")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return DataError(
            f"{self._folder / file}: the shard cannot be mapped ({why}), though no other shard is mapped any longer; "
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
