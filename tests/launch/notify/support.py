"""A webhook, a sendmail and a command that keep what they are given."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

SECRET = "B0-token-that-nobody-may-see"


@dataclass
class Webhook:
    """A server on loopback that answers `status` after `delay_s` seconds.

    Attributes:
        posted: The bodies that came, as JSON, oldest first.
        times: When each came, in Unix seconds.
    """

    status: int = 200
    delay_s: float = 0.0
    port: int = 0
    posted: list[Any] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/hooks/{SECRET}"

    @property
    def texts(self) -> list[str]:
        """The first line of each message."""
        return [body["text"].splitlines()[0] for body in self.posted]


@contextlib.contextmanager
def webhook() -> Iterator[Webhook]:
    """A webhook that accepts everything until the block ends."""
    about, over = Webhook(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == f"/hooks/{SECRET}" and self.headers["Content-Type"] == "application/json"
            about.posted.append(json.loads(body))
            about.times.append(time.time())
            over.wait(about.delay_s)
            with contextlib.suppress(OSError):
                self.send_response(about.status)
                for name, value in about.headers.items():
                    self.send_header(name, value)
                self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    about.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield about
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def write_settings(home: Path, **values: Any) -> Path:
    """The user's file below `XDG_CONFIG_HOME`."""
    file = home / "pipeline" / "notify.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(0o600)
    file.write_text(yaml.safe_dump(values))
    file.chmod(0o600)
    return file


def script(file: Path, lines: str) -> Path:
    """A program of the shell."""
    file.write_text(f"#!/bin/sh\n{lines}\n")
    file.chmod(0o755)
    return file
