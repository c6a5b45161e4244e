"""The folder for caches in a container: what lies there is executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.launch.container.caches import cache_folder, cache_variables, make_cache_folder


def test_the_folder_is_made_for_this_user_alone_and_named_inside(tmp_path: Path) -> None:
    make_cache_folder(tmp_path)
    folder = cache_folder(tmp_path)
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    assert set(cache_variables(tmp_path).values()) == {str(folder), str(folder / "matplotlib")}


def test_a_folder_of_that_name_that_others_made_is_never_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    cache_folder(tmp_path).symlink_to(tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"pipeline-cache-.*`scratch`"):
        make_cache_folder(tmp_path)
    cache_folder(tmp_path).unlink()
    cache_folder(tmp_path).mkdir()
    cache_folder(tmp_path).chmod(0o777)
    with pytest.raises(UsageError):
        make_cache_folder(tmp_path)


def test_without_a_scratch_folder_it_is_in_tmp() -> None:
    assert cache_folder(None) == Path(f"/tmp/pipeline-cache-{os.getuid()}")
