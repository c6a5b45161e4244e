"""One devcluster of four nodes for all tests here; on a failure its logs stay in build/cluster-logs."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.support import ROOT, Cluster, open_cluster, pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Four nodes that are up. Whoever kills a node starts it again."""
    # On the shared tree, since each node has a /tmp of its own; short, since sockets are in it.
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cl-", dir=ROOT / "build"))
    failed_before = request.session.testsfailed
    pipeline("devcluster", "up", "--state", str(folder / "state"), "--nodes", "4")
    try:
        yield open_cluster(folder / "state", folder / "work")
    finally:
        if request.session.testsfailed > failed_before:
            shutil.copytree(folder / "state" / "log", ROOT / "build" / "cluster-logs", dirs_exist_ok=True)
        pipeline("devcluster", "down", "--state", str(folder / "state"))
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _no_jobs_left(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.cancel_all()
