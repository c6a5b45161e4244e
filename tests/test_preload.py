"""Ranks of tests inherit what tests/preload.py imports; the fork server hides its errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.run.world import World
from tests import processes

LAST = "deepspeed.runtime.zero.stage3"


def inherited(world: World) -> tuple[bool, bool]:
    return LAST in sys.modules, "TORCHINDUCTOR_CACHE_DIR" in os.environ


def test_a_rank_has_all_imports_and_no_folder_of_the_compiler(tmp_path: Path) -> None:
    assert processes.on_ranks(inherited, 1, tmp_path / "log") == [(True, False)]
