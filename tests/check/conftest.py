"""A pretended Slurm, that of the launcher's tests, whose partitions differ."""

from __future__ import annotations

import pytest

from tests.launch.conftest import no_settings as no_settings
from tests.launch.conftest import slurm as slurm
from tests.launch.support import FakeSlurm

PARTITIONS = """main*|4|8|64000|1-00:00:00|gpu:a100:4(S:0-1)|up
small|1|2|4000|10:00|(null)|up
small|1|4|8000|10:00|(null)|up
"""


@pytest.fixture
def cluster(slurm: FakeSlurm) -> FakeSlurm:
    """Four nodes in `main`, two of which are down, and two unlike ones in `small`."""
    slurm.says("sinfo", PARTITIONS, call=1)
    for stage in range(3):
        slurm.says("sinfo", "gpu1\ngpu2\ngpu3\ngpu4\n", call=2 + 2 * stage)
    slurm.says("sinfo", "gpu1|idle|(null)|\ngpu2|allocated|(null)|\ngpu3|drained|(null)|\ngpu4|down*|(null)|\n")
    return slurm
