"""Settings and hooks for every test."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

# Before any test imports torch: the workers of a test run share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("pipeline", deadline=None, derandomize=True)
settings.load_profile("pipeline")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests with the largest time limits first, so that no worker is left with a long one at the end."""

    def allowed_s(item: pytest.Item) -> float:
        limit = item.get_closest_marker("timeout")
        return float(limit.args[0] if limit else item.config.getini("timeout"))

    items.sort(key=allowed_s, reverse=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fails a skipped test in CI, where everything is installed; only a GPU may be missing."""
    report = yield
    allowed = hasattr(report, "wasxfail") or item.get_closest_marker("gpu")
    if os.environ.get("CI") and report.skipped and not allowed:
        report.outcome = "failed"
        report.longrepr = f"no test may be skipped in CI: {report.longrepr}"
    return report
