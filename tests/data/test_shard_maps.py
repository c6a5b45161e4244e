"""Shards are read with as many maps as the machine allows, whatever it refuses."""

from __future__ import annotations

import errno
import mmap
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.manifest import Shard
from pipeline.data.shard_maps import ShardMaps, open_files_for
from pipeline.errors import DataError

SHARDS = 30
TOKENS = np.dtype("<u2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(SHARDS):
        np.full(8, number, TOKENS).tofile(tmp_path / f"{number}.bin")
    return tmp_path


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Stands in for the limits of open files: the soft and the hard one, as they were set, newest last."""
    kept = [(64, 64)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: kept[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: kept.append(pair))
    return kept


def refusing(most: int, reason: int) -> type[mmap.mmap]:
    """A class of maps of which no more than `most` exist at a time."""

    class Maps(mmap.mmap):
        alive = 0

        def __new__(cls, *args: Any, **options: Any) -> Any:
            if Maps.alive >= most:
                raise OSError(reason, os.strerror(reason))
            made = super().__new__(cls, *args, **options)
            Maps.alive += 1
            return made

        def __del__(self) -> None:
            Maps.alive -= 1

    return Maps


def shard(number: int, offset: int = 0, tokens: int = 8) -> Shard:
    """The description of one of the files, or of a range of it."""
    return Shard(f"{number}.bin", "0.idx", "s", "train", tokens, 1, 0, tokens, SHARDS, "", "", offset)


def test_a_shard_may_be_a_range_of_its_file(folder: Path) -> None:
    np.arange(8, dtype=TOKENS).tofile(folder / "0.bin")
    maps = ShardMaps(folder, folder, TOKENS, 2)
    assert maps.tokens(shard(0, 2, 3)).tolist() == [1, 2, 3]
    assert maps.tokens(shard(0, 8, 4)).tolist() == [4, 5, 6, 7]
    with pytest.raises(DataError, match=r"0\.bin"):
        maps.tokens(shard(0, 8, 5))


def values(maps: ShardMaps) -> list[int]:
    """Reads every shard twice, forwards and backwards."""
    order = [*range(SHARDS), *reversed(range(SHARDS))]
    return [int(maps.tokens(shard(number))[3]) - number for number in order]


@pytest.mark.parametrize("reason", [errno.EPERM, errno.ENOMEM, errno.EMFILE])
def test_a_refused_map_costs_older_ones_and_not_the_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    maps = ShardMaps(folder, folder, TOKENS, SHARDS)
    monkeypatch.setattr(mmap, "mmap", refusing(10, reason))
    assert values(maps) == [0] * 2 * SHARDS


def test_a_machine_that_refuses_every_map_is_named_with_its_limits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limits: list[tuple[int, int]]
) -> None:
    maps = ShardMaps(folder, folder, TOKENS, SHARDS)
    monkeypatch.setattr(mmap, "mmap", refusing(0, errno.ENOMEM))
    with pytest.raises(DataError, match=rf"^{folder}/0.bin: .*Cannot allocate memory.* 64 .*hard limit 64"):
        maps.tokens(shard(0))


def test_a_shard_that_is_gone_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"^{folder}/{SHARDS}.bin: .*No such file"):
        ShardMaps(folder, folder, TOKENS, 1).tokens(shard(SHARDS))


@pytest.mark.parametrize(("hard", "raised"), [(100_000, open_files_for(SHARDS)), (100, 100)])
def test_the_soft_limit_is_raised_as_far_as_the_shards_need_it(
    folder: Path, limits: list[tuple[int, int]], hard: int, raised: int
) -> None:
    limits[:] = [(64, hard)]
    ShardMaps(folder, folder, TOKENS, SHARDS)
    assert limits[-1] == (raised, hard)


def test_half_of_the_open_files_are_left_for_everything_else(folder: Path, limits: list[tuple[int, int]]) -> None:
    limits[:] = [(20, 20)]
    maps = ShardMaps(folder, folder, TOKENS, SHARDS)
    before = open_files()
    assert values(maps) == [0] * 2 * SHARDS
    assert open_files() - before <= 10


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
