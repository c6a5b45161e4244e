"""A run folder from others makes no command contact the address that it names, nor write the file."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import PipelineError
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.upload.sync import sync, sync_quietly
from tests.tracking.support import begin, make_run

Trap = tuple[str, list[str | None]]


@pytest.fixture
def trap() -> Iterator[Trap]:
    """The address of a server, and the credentials of everything that came."""
    came: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            came.append(self.headers.get("Authorization"))
            self.send_error(500)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", came
    server.shutdown()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made, config = make_run(tmp_path, "none")
    tracker = begin(made, config)
    tracker.log(5, {"train/loss": 3.0})
    tracker.close("FINISHED")
    return made


def rename_store(run: Run, uri: str) -> None:
    """Makes both files of a folder name another store."""
    run.config_file.write_text(run.config_file.read_text().replace("uri: none", f"uri: {uri}"))
    state = json.loads(run.mlflow_file.read_text())
    run.mlflow_file.write_text(json.dumps({**state, "store": uri}))


@pytest.mark.parametrize("keeps_state", [True, False])
def test_a_copied_folder_contacts_nobody(run: Run, trap: Trap, keeps_state: bool, tmp_path: Path) -> None:
    uri, came = trap
    received = Run(Path(shutil.copytree(run.path, tmp_path / "received")))
    rename_store(received, uri)
    if not keeps_state:
        received.mlflow_file.unlink()
    with pytest.raises(PipelineError, match=f"--uri {uri}"):
        sync(received)
    sync_quietly(received)
    assert came == []


def test_a_received_folder_writes_no_file_that_it_names(run: Run, tmp_path: Path) -> None:
    received = Run(Path(shutil.copytree(run.path, tmp_path / "received")))
    rename_store(received, f"sqlite:///{tmp_path}/private/file.db")
    with pytest.raises(PipelineError, match="--uri"):
        sync(received)
    assert not (tmp_path / "private").exists()


def test_a_folder_of_another_user_contacts_nobody(run: Run, trap: Trap, monkeypatch) -> None:
    uri, came = trap
    rename_store(run, uri)
    monkeypatch.setattr(upload_state.os, "geteuid", lambda: 54321)
    sync_quietly(run)
    assert came == []


@pytest.mark.parametrize("how", ["own folder", "environment", "by hand"])
def test_ones_own_store_is_contacted(run: Run, trap: Trap, how: str, tmp_path: Path, monkeypatch) -> None:
    uri, came = trap
    target = run if how == "own folder" else Run(Path(shutil.copytree(run.path, tmp_path / "copied")))
    rename_store(target, uri)
    if how == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(PipelineError, match=f"MLflow at {uri}"):
        sync(target, uri if how == "by hand" else None)
    assert came
