"""More shards than the machine lets one process map."""

from __future__ import annotations

import errno
import mmap
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests import processes
from tests.data.helpers import cut_into_shards
from tests.data.test_shard_maps import refusing
from tests.experiment import curve, validations
from tests.once import made_once
from tests.train.conftest import Lab

SHARDS = 1200


def with_few_open_files(arguments: list[str]) -> None:
    """Runs the command line under `ulimit -n 256`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    processes.command(arguments)


def with_few_maps(arguments: list[str]) -> None:
    """Runs the command line where the hundredth map is refused."""
    mmap.mmap = refusing(99, errno.EPERM)  # type: ignore[misc]
    processes.command(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("disturbed", [with_few_open_files, with_few_maps])
def test_more_shards_than_maps_are_trained_on_with_the_same_losses(
    lab: Lab, tmp_path: Path, disturbed: Callable[[list[str]], None]
) -> None:
    whole = lab.uninterrupted(1, 0)
    config = lab.config(disturbed.__name__)
    tokens = Path(yaml.safe_load(config.read_text())["data"]["path"])
    cut = tokens.with_name("cut")
    made_once(cut, lambda: cut_into_shards(tokens, cut, SHARDS))
    ranks = processes.fork(disturbed, (["train", str(config), f"data.path={cut}"],), 1, tmp_path / "log")
    assert ranks.within(ranks.poll, 120) and ranks.codes == {0: 0}, ranks.words()
    run = whole.with_name(disturbed.__name__)
    assert curve(run) == curve(whole)
    assert validations(run) == validations(whole)
