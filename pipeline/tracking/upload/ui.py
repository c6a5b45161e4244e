"""`pipeline ui`: runs MLflow's own server on loopback for the store of a run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.sections import TrackingConfig
from pipeline.errors import PackageMissing, PipelineError, UsageError
from pipeline.processes import end_with_parent
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
from pipeline.tracking.upload.gate import Gate, private_folder
from pipeline.tracking.upload.store import resolve_uri

_START_S = 90.0
_STOP_S = 10.0
_TAIL_BYTES = 4096
# No proxy: these addresses are on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    """Its address."""
    process: subprocess.Popen[bytes]
    """Its first process, the leader of its own process group."""
    token: str | None = None
    """What each request has to carry; None for a server that anyone may ask."""

    def ask(self, path: str, timeout_s: float) -> bytes:
        """Returns the answer to a request.

        Raises:
            OSError: There is none, or it is an error.
        """
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.url}{path}", headers=headers)
        with _OPENER.open(request, timeout=timeout_s) as answer:
            content: bytes = answer.read()
        return content


@contextlib.contextmanager
def local_server(uri: str, port: int, log: Path | None = None, options: Sequence[str] = ()) -> Iterator[Server]:
    """Runs `mlflow server` for a sqlite store on loopback until the block ends, for every user of this machine.

    Without a log its output goes to a temporary file.

    Raises:
        PipelineError: The server does not come up.
    """
    options = ["--host", "127.0.0.1", "--port", str(port), *options]
    with _running(uri, f"http://127.0.0.1:{port}", None, options, log) as server:
        yield server


@contextlib.contextmanager
def guarded_server(uri: str, port: int | None = None) -> Iterator[Server]:
    """Runs `mlflow server` as `local_server` does, for whoever knows the token alone.

    Raises:
        UsageError: The port is taken.
        PipelineError: The server does not come up.
    """
    with private_folder() as folder, contextlib.closing(Gate(port, folder / "mlflow")) as gate:
        # The page shows artifacts without it: it lets clients write them.
        options = ["--uvicorn-opts", f"--uds {folder / 'mlflow'}", "--no-serve-artifacts"]
        with _running(uri, gate.url, gate.token, options, None) as server:
            yield server


@contextlib.contextmanager
def _running(uri: str, url: str, token: str | None, options: Sequence[str], log: Path | None) -> Iterator[Server]:
    """Runs the server and stops all its processes at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", resolve_uri(uri)]
    # Without job execution it needs 2 processes and 480 MB instead of 15 and 2.7 GB.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with contextlib.ExitStack() as stack:
        printed = stack.enter_context(tempfile.TemporaryFile()) if log is None else stack.enter_context(log.open("a+b"))
        output = printed.fileno()
        process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),  # mlflow stops its own children
        )
        stack.callback(_stop, process)
        server = Server(url, process, token)
        _wait_until_it_answers(server, output)
        yield server


def serve(run: Run | None, port: int | None) -> None:
    """Serves MLflow's page until Ctrl-C and prints its address; for a run on a server it only prints the address.

    Raises:
        UsageError: There is no store to show, or the port is taken.
        PipelineError: The server does not come up.
    """
    uri = TrackingConfig().uri if run is None else upload_state.load(run).store or run.config().tracking.uri
    if uri == "none":
        raise UsageError("tracking.uri is none, so there is no store to show; try `pipeline report`")
    uri = resolve_uri(uri)
    if not uri.startswith("sqlite:"):
        print(f"MLflow: {uri}")
        return
    file = Path(uri.removeprefix("sqlite:///"))
    if not file.is_file():
        raise UsageError(f"{file}: no such store yet; train a run first, or name one: pipeline ui RUN")
    if importlib.util.find_spec("mlflow") is None:
        raise PackageMissing("mlflow")
    # Where a signal or a closed terminal ends this process, the server must end too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with guarded_server(uri, port) as server, contextlib.suppress(KeyboardInterrupt):
        run_id = None if run is None else upload_state.load(run).of(uri).run_id
        print(f"MLflow: {page_of(server, run_id)} (Ctrl-C ends it; keep the address to yourself)", flush=True)
        server.process.wait()


def page_of(server: Server, run_id: str | None) -> str:
    """Returns the address to open: the page of the run if there is one, not MLflow's pages for language agents."""
    path = "/experiments"
    if run_id is not None:
        with contextlib.suppress(urllib.error.HTTPError):  # the run was purged from the store
            found = json.loads(server.ask(f"/api/2.0/mlflow/runs/get?run_id={run_id}", 30))
            path = f"/experiments/{found['run']['info']['experiment_id']}/runs/{run_id}"
    token = "" if server.token is None else f"?token={server.token}"
    return f"{server.url}/{token}#{path}?workflowType=machine_learning"


def _wait_until_it_answers(server: Server, output: int) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if server.process.poll() is not None:
            said = _last_line(output)
            raise PipelineError(
                f"mlflow server ended with status {server.process.returncode} before it answered: {said}"
            )
        try:
            server.ask("/health", 5)
            return
        except OSError:
            time.sleep(0.2)
    raise PipelineError(f"mlflow server did not answer at {server.url} within {_START_S:.0f} s: {_last_line(output)}")


def _last_line(output: int) -> str:
    # `pread` does not move the position, at which the server continues to write.
    tail = os.pread(output, _TAIL_BYTES, max(0, os.fstat(output).st_size - _TAIL_BYTES))
    lines = tail.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
            # A server that ended in order has stopped its workers; one that hangs is killed with its group.
            if number == signal.SIGTERM:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            return
