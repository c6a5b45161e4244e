"""`pipeline ui`: runs MLflow's own server on loopback for the store of a run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
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
from pipeline.errors import PipelineError, UsageError
from pipeline.processes import end_with_parent
from pipeline.run.folder import Run
from pipeline.tracking import upload_state
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


@contextlib.contextmanager
def local_server(
    uri: str, port: int | None = None, log: Path | None = None, options: Sequence[str] = ()
) -> Iterator[Server]:
    """Runs `mlflow server` for a sqlite store on loopback until the block ends, then stops all its processes.

    Without a port it takes a free one; without a log its output goes to a temporary file.

    Raises:
        UsageError: The port is taken.
        PipelineError: The server does not come up.
    """
    port = _free_port(port)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", resolve_uri(uri), *options]
    # Without job execution it needs 2 processes and 480 MB instead of 15 and 2.7 GB.
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with contextlib.ExitStack() as stack:
        printed = stack.enter_context(tempfile.TemporaryFile()) if log is None else stack.enter_context(log.open("a+b"))
        output = printed.fileno()
        process = subprocess.Popen(
            command,
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=end_with_parent(signal.SIGTERM),  # mlflow stops its own children
        )
        stack.callback(_stop, process)
        _wait_until_it_answers(url, process, output)
        yield Server(url, process)


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
    # Where a signal or a closed terminal ends this process, the server must end too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with local_server(uri, port) as server, contextlib.suppress(KeyboardInterrupt):
        run_id = None if run is None else upload_state.load(run).of(uri).run_id
        print(f"MLflow: {page_of(server.url, run_id)} (Ctrl-C ends it)", flush=True)
        server.process.wait()


def page_of(url: str, run_id: str | None) -> str:
    """Returns the address to open: the page of the run if there is one, not MLflow's pages for language agents."""
    path = "/experiments"
    if run_id is not None:
        with (
            contextlib.suppress(urllib.error.HTTPError),  # the run was purged from the store
            _OPENER.open(f"{url}/api/2.0/mlflow/runs/get?run_id={run_id}", timeout=30) as answer,
        ):
            path = f"/experiments/{json.load(answer)['run']['info']['experiment_id']}/runs/{run_id}"
    return f"{url}/#{path}?workflowType=machine_learning"


def _free_port(wanted: int | None) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise UsageError(f"port {wanted} is taken ({error.strerror}); choose another with --port") from error
        return int(probe.getsockname()[1])


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], output: int) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            said = _last_line(output)
            raise PipelineError(f"mlflow server ended with status {process.returncode} before it answered: {said}")
        try:
            with _OPENER.open(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise PipelineError(f"mlflow server did not answer at {url} within {_START_S:.0f} s: {_last_line(output)}")


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
