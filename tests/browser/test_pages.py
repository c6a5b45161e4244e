"""What a user sees: MLflow's page and the report, of a run that was killed once and resumed."""

import hashlib
import math
import random
import time

import pytest

from pipeline.files import write_json, write_text
from pipeline.run.events import Checkpointed, Finished, Requeued, Resumed, Started, Submitted, append
from pipeline.tracking.report.report import write_report
from pipeline.tracking.upload.sync import sync
from pipeline.tracking.upload.ui import guarded_server, page_of
from tests.tracking.conftest import InThread
from tests.tracking.support import begin, make_run, open_store

pytestmark = [pytest.mark.browser, pytest.mark.slow]


class Clock:
    """An hour of training that takes no time; steps take half a second by it."""

    def __init__(self):
        self.now = time.time() - 3600

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def trained(folder, *overrides, floor=2.2, seed=1):
    """A run with curves like those of a training: submitted, killed, started again, evaluated, sampled."""
    run, config = make_run(folder, "none", "train.max_iters=600", *overrides)

    def steps(tracker, first, last):
        for step in range(first, last + 1, 5):
            clock.wait(2.5)
            noise = random.Random(1000 * seed + step)  # a step is a function of its number, as in a training
            loss = floor + 5 * math.exp(-step / 90) + 0.05 * noise.random()
            times = {"time/data_s": 0.002, "time/forward_backward_s": 0.45 + 0.01 * noise.random()}
            times |= {"time/optimizer_s": 0.03, "time/checkpoint_stall_s": 0.02 if step % 100 == 0 else 0.0}
            rates = {"train/tokens_per_s": 9000 + 500 * noise.random(), "train/flops_per_s": 2e9}
            norm = {"train/lr": 1e-3 * min(1, step / 50), "train/grad_norm": 0.5 + 3 * math.exp(-step / 50)}
            tracker.log(step, {"train/loss": loss, **norm, **rates, **times, "train/tokens_seen": 4096 * step})
            if step % 100 == 0:
                val = {"val/loss": loss + 0.1, "val/perplexity": math.exp(loss + 0.1), "val/bits_per_byte": loss / 3}
                tracker.log(step, val)
                path, digest = str(run.checkpoints / f"step_{step:08d}"), hashlib.sha256(bytes(step)).hexdigest()
                tracker.event(Checkpointed(step=step, path=path, digest=digest))

    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.time", clock)
        patch.setattr("pipeline.tracking.tracker._process_began", lambda: clock.now - 8)
        patch.setattr("pipeline.tracking.tracker.Helper", InThread)
        append(run.events_file, Submitted(jobs=["41"]))
        clock.wait(50)
        tracker = begin(run, config)
        tracker.event(Started(step=0))
        steps(tracker, 5, 360)  # and killed
        tracker._history.close()
        clock.wait(20)
        append(run.events_file, Requeued(job="41"))
        clock.wait(30)
        tracker = begin(run, config, 300)
        tracker.event(Resumed(step=300))
        steps(tracker, 305, 600)
        tracker.event(Finished(step=600))
        tracker.close("FINISHED")
    write_text(run.samples / "step_00000600.txt", "My fellow citizens, the state of the union is <b>strong</b>.")
    result = {"step": 600, "loss": floor + 0.1, "perplexity": math.exp(floor + 0.1), "bits_per_byte": 0.74}
    write_json(run.evaluation_file, {**result, "tokens": 123_456})
    return run, config


def test_the_mlflow_page_shows_the_run_with_its_loss_chart_and_its_params(browser, tmp_path):
    run, config = trained(tmp_path)
    sync(run, f"sqlite:///{tmp_path}/mlflow.db")
    store, run_id = open_store(run, config)
    experiment = store.read_run(run_id).info.experiment_id
    with guarded_server(f"sqlite:///{tmp_path}/mlflow.db") as server:
        browser.driver.set_window_size(1700, 1300)
        page, _, training = page_of(server, run_id).rpartition("?")
        entrance, _, _ = page.partition("#")
        browser.open(f"{entrance}#/experiments/{experiment}/runs?{training}")
        browser.until("[...document.querySelectorAll('a')].some(link => link.innerText.trim() == 'try')")
        browser.shot("mlflow-runs")
        assert server.token not in browser.driver.current_url
        browser.open(f"{page}?{training}")
        browser.until("document.body.innerText.includes('model.d_model')")
        text = browser.text()
        assert "Finished" in text and "train.max_iters" in text and "0123abc" in text
        browser.shot("mlflow-run")
        browser.open(f"{page}/model-metrics?{training}")
        browser.type_into("input[placeholder='Search metric charts']", "loss")
        cards = "[...document.querySelectorAll('[data-testid=\"experiment-view-compare-runs-card\"]')]"
        loss = f"{cards}.find(c => c.innerText.includes('train/loss'))"
        drawn = browser.until(
            f"({loss}?.querySelector('.js-plotly-plot path.js-line')?.getAttribute('d') ?? '').length"
        )
        assert drawn > 500
        browser.shot("mlflow-charts")


def test_the_report_draws_its_charts_without_an_error_or_a_network(browser, tmp_path):
    run, _ = trained(tmp_path)
    page = write_report([run])
    browser.open(page.as_uri())
    browser.until("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    charts = "[...document.querySelectorAll('.js-plotly-plot')]"
    browser.until(f"{charts}.every(c => c.querySelectorAll('.scatterlayer path.js-line, .bars path').length > 0)")
    assert browser.driver.execute_script(f"return {charts}.length") >= 7
    lines = "[...document.querySelectorAll('#chart-0 .scatterlayer path.js-line')].map(p => p.getAttribute('d').length)"
    training, validation, restart = browser.driver.execute_script(f"return {lines}")
    assert training > 1000 and validation > 20 and restart > 5
    boxes = "['.legend', '.modebar-group'].map(c => document.querySelector('#chart-0 ' + c).getBoundingClientRect())"
    legend, buttons = browser.driver.execute_script(f"return {boxes}")
    assert legend["top"] > buttons["bottom"] and legend["height"] > 5 < buttons["height"]
    assert "strong" in browser.text() and not browser.driver.execute_script("return document.querySelector('pre b')")
    bars = "[...document.querySelectorAll('.bars path')].map(b => b.getBoundingClientRect())"
    assert browser.driver.execute_script(f"return Math.max(...{bars}.map(b => b.width * b.height))") > 1000
    browser.shot("report", whole=True)
    assert browser.errors() == []
    asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
    assert asked and all(url == page.as_uri() for url in asked), asked


def test_the_report_of_two_runs_overlays_them(browser, tmp_path):
    first, _ = trained(tmp_path)
    second, _ = trained(tmp_path, "name=wider", "model.d_model=32", floor=1.9, seed=2)
    page = write_report([first, second], tmp_path / "both.html")
    browser.open(page.as_uri())
    browser.until("document.querySelectorAll('#chart-0 .scatterlayer path.js-line').length == 6")
    assert "model.d_model" in browser.text() and "wider restarted" in browser.text()
    browser.shot("report-two-runs", whole=True)
    assert browser.errors() == []
