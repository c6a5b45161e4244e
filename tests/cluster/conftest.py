"""One devcluster per test process, and times measured on it; after a failure its logs stay in build/cluster-logs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.support import ROOT, Cluster, Figures, open_cluster, pipeline

_FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under xdist, passes the figures of a worker to the process that prints them."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["figures"] = session.config.stash[_FIGURES].seconds


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collects the figures of a worker that has ended."""
    node.config.stash[_FIGURES].seconds.update(getattr(node, "workeroutput", {}).get("figures", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash[_FIGURES].seconds
    if not figures:
        return
    terminalreporter.section("seconds, measured on the devcluster")
    for what, seconds in sorted(figures.items()):
        terminalreporter.write_line(f"{seconds:8.2f}  {what}")
    if "CLUSTER_FIGURES" in os.environ:
        Path(os.environ["CLUSTER_FIGURES"]).write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> Figures:
    """The collection to which tests add measured times."""
    return request.config.stash[_FIGURES]


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Five nodes that are up. A test that kills a node starts it again."""
    # In the checkout, which all nodes share, since each has its own /tmp; short, since it holds sockets.
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir=ROOT / "build"))
    failed_before = request.session.testsfailed
    pipeline("devcluster", "up", "--state", str(folder / "state"), "--nodes", "5")
    try:
        yield open_cluster(folder / "state", folder / "work")
    finally:
        if request.session.testsfailed > failed_before:
            shutil.copytree(folder / "state" / "log", ROOT / "build" / "cluster-logs", dirs_exist_ok=True)
        pipeline("devcluster", "down", "--state", str(folder / "state"))
        shutil.rmtree(folder)
