"""The page of a store is its owner's alone, on a machine that others use too."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import requests

from pipeline.errors import UsageError
from pipeline.tracking.upload.gate import Gate, private_folder
from pipeline.tracking.upload.sync import sync
from pipeline.tracking.upload.ui import guarded_server, page_of
from tests.tracking.support import begin, make_run

STRANGER = 65534


class Behind:
    """A server behind a gate that answers each request with the request itself."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "server"
        self.heard: list[bytes] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self.path))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                words = b""
                while not _whole(words) and (piece := connection.recv(1000)):
                    words += piece
                self.heard.append(words)
                connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + words)


def _whole(words: bytes) -> bool:
    """Whether the request has come to its end: its body may come after its head, in a packet of its own."""
    head, end, body = words.partition(b"\r\n\r\n")
    return bool(end) and len(body) == (4 if b"Content-Length: 4" in head else 0)


@pytest.fixture
def behind() -> Iterator[Behind]:
    """A server in a folder of its own."""
    with private_folder() as folder:
        yield Behind(folder)


@pytest.fixture
def gate(behind: Behind) -> Iterator[Gate]:
    """A gate in front of it."""
    with closing(Gate(None, behind.path)) as made:
        yield made


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
@pytest.mark.parametrize("path", ["/", "/api/2.0/mlflow/runs/search", "/get-artifact?path=x", "/?token=", "/?token=x"])
def test_without_the_token_nothing_passes(gate: Gate, behind: Behind, method: str, path: str) -> None:
    wrong = {"Authorization": "Bearer wrong", "Cookie": "pipeline_ui=wrong"}
    for headers in ({}, wrong):
        answer = requests.request(method, gate.url + path, headers=headers, timeout=10, allow_redirects=False)
        assert answer.status_code == 401 and "Set-Cookie" not in answer.headers
        assert gate.token not in answer.text
    assert behind.heard == []


def test_the_address_gives_a_browser_its_cookie_and_leaves_no_token_behind(gate: Gate, behind: Behind) -> None:
    with requests.Session() as browser:
        answer = browser.get(f"{gate.url}/?token={gate.token}", timeout=10)
        assert answer.status_code == 200 and answer.url == f"{gate.url}/"
        cookie = answer.history[0].headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Strict" in cookie
        answer = browser.post(f"{gate.url}/api?a=b", data=b"body", timeout=10)
    assert answer.text.startswith("POST /api?a=b HTTP/1.1\r\n") and answer.text.endswith("\r\n\r\nbody")
    assert gate.token.encode() not in b"".join(behind.heard), "it is the gate's"


def test_a_second_request_behind_one_that_may_pass_needs_the_token_too(gate: Gate, behind: Behind) -> None:
    """Other sites' requests may share a browser's connection."""
    host, port = gate.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        known = f"GET /1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gate.token}\r\nConnection: keep-alive\r\n\r\n"
        connection.sendall(known.encode())
        said = b""
        while piece := connection.recv(1000):
            said += piece
    assert b"GET /1" in said and len(behind.heard) == 1
    assert b"keep-alive" not in behind.heard[0] and b"Connection: close" in behind.heard[0]


@pytest.mark.parametrize("words", [b"\r\n\r\n", b"GET\r\n\r\n", b"GET http://x/ HTTP/1.1\r\n\r\n", b"x" * 100_000])
def test_what_is_no_request_gets_no_answer(gate: Gate, behind: Behind, words: bytes) -> None:
    host, port = gate.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            connection.sendall(words)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1000) == b""
        except ConnectionError:
            pass
    assert requests.get(gate.url, timeout=10).status_code == 401
    assert behind.heard == []


@pytest.mark.timing
def test_strangers_that_say_nothing_delay_no_request(gate: Gate) -> None:
    host, port = gate.url.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
    began = time.monotonic()
    assert requests.get(gate.url, headers={"Authorization": f"Bearer {gate.token}"}, timeout=10).status_code == 200
    assert time.monotonic() - began < 1
    for each in silent:
        each.close()


def test_a_port_that_is_taken_is_named(gate: Gate, behind: Behind) -> None:
    port = int(gate.url.rpartition(":")[2])
    with pytest.raises(UsageError, match=f"port {port} "):
        Gate(port, behind.path)


def as_stranger(check: Callable[[], bool]) -> bool:
    """What another user of the machine finds."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(STRANGER)
            os.setuid(STRANGER)
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_another_user_gets_no_page_no_record_and_no_file(folder: Path) -> None:
    run, config = make_run(folder)
    begin(run, config).close("FINISHED")
    run_id = sync(run).run_id
    paths = (
        "/", "/health", "/version", "/static-files/index.html", f"/api/2.0/mlflow/runs/get?run_id={run_id}",
        "/ajax-api/2.0/mlflow/experiments/search", f"/get-artifact?run_uuid={run_id}&path=config.yaml",
        "/api/2.0/mlflow-artifacts/artifacts", "/graphql", "/docs", "/openapi.json",
    )  # fmt: skip
    with guarded_server(config.tracking.uri) as server:
        host = server.url.removeprefix("http://")
        sockets = list(Path("/tmp").glob("pipeline-ui-*/mlflow"))

        def nothing() -> bool:
            for path in paths:
                connection = http.client.HTTPConnection(host, timeout=10)
                connection.request("GET", path)
                if connection.getresponse().status != 401:
                    return False
            for path in sockets:
                with socket.socket(socket.AF_UNIX) as direct:
                    if direct.connect_ex(str(path)) == 0:
                        return False
            return not any(os.access(Path("/tmp") / p.parent.name, os.R_OK) for p in sockets)

        assert sockets
        assert as_stranger(nothing)
        known = {"Authorization": f"Bearer {server.token}"}
        for path in (f"/api/2.0/mlflow/runs/get?run_id={run_id}", f"/get-artifact?run_uuid={run_id}&path=config.yaml"):
            assert requests.get(server.url + path, headers=known, timeout=30).status_code == 200
        written = requests.put(
            f"{server.url}/api/2.0/mlflow-artifacts/artifacts/x", headers=known, data=b"x", timeout=30
        )
        assert not written.ok, "not even the owner's page takes files"
        page = requests.get(page_of(server, run_id), timeout=30)
        assert page.status_code == 200 and "<html" in page.text.lower()
