"""MLflow's page: served on loopback, stopped with its starter, and clear about why it fails."""

import re
import signal
import subprocess
import sys
from functools import partial

import psutil
import pytest
import requests

from pipeline.errors import PipelineError
from pipeline.tracking.upload.sync import sync
from pipeline.tracking.upload.ui import local_server
from tests.processes import free_port
from tests.tracking.support import begin, make_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_the_page_of_a_store_starts_on_loopback_and_leaves_no_process(folder, number):
    run, config = make_run(folder)
    begin(run, config).close("FINISHED")
    run_id = sync(run).run_id
    command = [sys.executable, "-m", "pipeline", "ui", str(run.path)]
    # What a shell runs in the background ignores Ctrl-C, and so would its children.
    hears_control_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    page = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hears_control_c)
    try:
        address = page.stdout.readline()
        url, token, experiment = re.match(
            r"MLflow: (http://127\.0\.0\.1:\d+)/\?token=([\w-]+)#/experiments/(\d+)/runs/" + run_id, address
        ).groups()
        known = {"Authorization": f"Bearer {token}"}
        assert requests.get(f"{url}/health", headers=known, timeout=30).status_code == 200
        experiments = f"{url}/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
        assert requests.get(experiments, headers=known, timeout=30).ok
        children = psutil.Process(page.pid).children(recursive=True)
        listening = [
            c.laddr for p in (psutil.Process(page.pid), *children) for c in p.net_connections() if c.status == "LISTEN"
        ]
        assert [f"http://{a.ip}:{a.port}" for a in listening] == [url], "only the gate listens"
        assert not any(token in " ".join(p.cmdline()) for p in children)
    finally:
        page.send_signal(signal.Signals[number])
        page.wait(timeout=30)
    _, left = psutil.wait_procs(children, timeout=30)
    running = [p for p in left if p.is_running() and p.status() != "zombie"]
    for process in running:
        process.kill()
    assert not running


def test_a_server_that_does_not_start_says_why(folder):
    with (
        pytest.raises(PipelineError, match=r"status 2 before .*--no-such-option"),
        local_server(f"sqlite:///{folder}/mlflow.db", free_port(), options=("--no-such-option",)),
    ):
        pass
