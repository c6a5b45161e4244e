"""A process group of this process, for engines that train in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipeline.run.world import World
from pipeline.train.ranks import group


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """The group lasts as long as the module's tests."""
    with group.process_group(World(), torch.device("cpu")):
        yield
