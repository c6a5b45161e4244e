"""The checks of a node: each names the value that decided, and what to change."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.check import node
from pipeline.check.result import Check


@pytest.mark.parametrize(
    ("skew", "status"), [(0.0, "ok"), (5.0, "ok"), (-5.0, "ok"), (5.1, "failed"), (-60.0, "failed")]
)
def test_a_clock_that_is_wrong_by_more_than_five_seconds_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float, status: str
):
    monkeypatch.setattr("pipeline.check.node.clock_skew_s", lambda folder: skew)
    found = node._clock(tmp_path / "runs")
    assert found.status == status and f"{skew:+.0f}"[0] in found.found
    assert bool(found.cure) == (status == "failed")


def test_a_clock_that_cannot_be_compared_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path) -> float:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pipeline.check.node.clock_skew_s", refuse)
    assert node._clock(tmp_path).status == "warning"


@pytest.mark.parametrize(("blocks", "status"), [(250_000, "ok"), (249_999, "warning"), (15_625, "warning")])
def test_shared_memory_below_a_gigabyte_is_a_warning(monkeypatch: pytest.MonkeyPatch, blocks: int, status: str):
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_blocks=blocks, f_frsize=4000))
    assert node._shared_memory().status == status


@pytest.mark.parametrize(("soft", "status"), [(4096, "ok"), (4095, "warning"), (resource.RLIM_INFINITY, "ok")])
def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch, soft: int, status: str):
    monkeypatch.setattr("resource.getrlimit", lambda which: (soft, 1_048_576))
    found = node._open_files(256)
    assert found.status == status and ("ulimit -n 4096" in found.cure) == (status == "warning")


@pytest.mark.parametrize(("needed", "status"), [(4096, "ok"), (4097, "warning")])
def test_the_hard_limit_of_open_files_is_compared_with_what_the_dataset_needs(
    monkeypatch: pytest.MonkeyPatch, needed: int, status: str
):
    monkeypatch.setattr("resource.getrlimit", lambda which: (4096, 4096))
    found = node._open_files(needed)
    assert found.status == status and "4096" in found.found and bool(found.cure) == (status == "warning")


def test_locked_memory_matters_only_with_infiniband(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resource.getrlimit", lambda which: (64_000_000, 64_000_000))
    for infiniband, status in ((True, "warning"), (False, "ok")):
        monkeypatch.setattr("pathlib.Path.exists", lambda path, there=infiniband: there)
        found = node._locked_memory()
        assert found.status == status and "64 MB" in found.found
    monkeypatch.setattr("resource.getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert node._locked_memory() == Check("locked memory", "ok", "unlimited")


def test_a_folder_counts_as_writable_if_the_nearest_existing_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert node._writable(tmp_path) == Check(f"writable {tmp_path}", "ok", "yes")
    below = node._writable(tmp_path / "a" / "b")
    assert below.status == "ok" and str(tmp_path) in below.found
    (tmp_path / "file").touch()
    assert node._writable(tmp_path / "file").status == "failed"


def test_a_package_that_cannot_be_imported_fails_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_package.py").write_text("print('noise')\nraise RuntimeError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = node._imports("broken_package")
    assert (found.status, found.found) == ("failed", "RuntimeError: no driver") and found.cure
    assert node._imports("numpy").status == "ok"
