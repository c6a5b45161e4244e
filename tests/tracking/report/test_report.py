import math
import re
import time

import pytest

from pipeline.errors import UsageError
from pipeline.files import write_text
from pipeline.run.events import Finished, Preempted, Resumed, Started
from pipeline.run.folder import open_run
from pipeline.tracking.goodput import Goodput
from pipeline.tracking.report.charts import Curve, Series, goodput_chart, line_chart, time_chart
from pipeline.tracking.report.report import write_report
from tests.tracking.support import begin, make_run


def recorded(folder, *overrides, scale=1.0):
    run, config = make_run(folder, "none", *overrides)
    tracker = begin(run, config)
    tracker.event(Started(step=0))
    for step in range(1, 31):
        times = {"time/data_s": 0.001, "time/forward_backward_s": 0.02, "time/optimizer_s": 0.004}
        metrics = {"train/loss": scale * 5 / step, "train/lr": 1e-3, "train/grad_norm": 2.0 / step}
        tracker.log(step, {**metrics, "train/tokens_per_s": 1000.0 + step, **times})
        if step % 10 == 0:
            tracker.log(step, {"val/loss": scale * 6 / step, "val/perplexity": 9.0, "val/bits_per_byte": 1.5})
    tracker.event(Preempted())
    tracker.close("STOPPED")
    tracker = begin(run, config, 20)
    tracker.event(Resumed(step=20))
    for step in range(21, 41):
        tracker.log(step, {"train/loss": scale * 5 / step, "time/data_s": 0.001, "time/forward_backward_s": 0.02})
    tracker.event(Finished())
    tracker.close("FINISHED")
    write_text(run.samples / "step_00000040.txt", "<script>alert('sampled')</script> & the people")
    return run


def without_script(page):
    return re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)


def test_the_page_is_complete_and_loads_nothing_from_outside(tmp_path):
    page = write_report([recorded(tmp_path)]).read_text()
    own = without_script(page)
    assert "Content-Security-Policy" in own and "default-src 'none'" in own
    assert not re.search(r'(?:src|href)\s*=\s*"(?!data:)', own)
    assert '"displaylogo": true' not in own  # it links to plotly's site
    for text in ("Loss", "Learning rate", "Gradient norm", "Throughput", "Goodput", "Time of a step", "config.yaml",
                 "Provenance", "Starts, stops and incidents", "0123abc", "step_00000040"):  # fmt: skip
        assert text in own
    assert page.count("Plotly.newPlot(") >= 6


def test_a_sample_cannot_run_as_a_script_in_the_page(tmp_path):
    own = without_script(write_report([recorded(tmp_path)]).read_text())
    assert "alert('sampled')" not in own and "&lt;script&gt;alert(&#39;sampled&#39;)" in own


def test_several_runs_are_overlaid_and_their_configs_compared(tmp_path):
    first = recorded(tmp_path)
    second = recorded(tmp_path, "name=other", "optimizer.learning_rate=2.0e-3", scale=0.9)
    own = without_script(write_report([first, second], tmp_path / "both.html").read_text())
    assert "try training" in own and "other training" in own
    differences = own.split("Differences of the configs")[1].split("</table>")[0]
    assert "optimizer.learning_rate" in differences and "0.002" in differences and "model.d_model" not in differences


def test_a_run_without_metrics_is_refused(tmp_path):
    run, _ = make_run(tmp_path, "none")
    with pytest.raises(UsageError, match=r"metrics\.jsonl"):
        write_report([run])


def test_thinning_keeps_spikes_and_nan():
    values = [1.0] * 100_000
    values[51_234], values[77_777] = 50.0, float("nan")
    thin = Curve(range(100_000), values).thinned(2000)
    assert len(thin.steps) <= 2000 and 50.0 in thin.values and any(v != v for v in thin.values)
    assert list(thin.steps) == sorted(thin.steps)


LOSS = [("train/loss", "training")]


def series(name="try", values=(3.0, 2.0), restarts=(), key="train/loss"):
    return Series(name, {key: Curve(range(len(values)), values)}, restarts, Goodput(training_s=10.0))


@pytest.mark.timing
def test_a_run_with_hundreds_of_restarts_is_drawn_quickly():
    began = time.monotonic()
    line_chart([series(restarts=range(300)), series("other", restarts=range(300))], LOSS, "nats")
    assert time.monotonic() - began < 10


def test_every_restart_is_a_line_in_the_color_of_its_run():
    figure = line_chart([series(restarts=range(300)), series("other", restarts=range(300))], LOSS, "nats")
    assert len(figure.layout.shapes) == 600
    first, last = figure.layout.shapes[0], figure.layout.shapes[-1]
    assert (first.x0, first.x1, first.y0, first.y1, first.yref) == (0, 0, 0, 1, "y domain")
    assert first.line.color != last.line.color


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ([3.0], [5]),
        ([3.0, math.nan, 2.0, 1.0, math.inf, 1.0], [5, 0, 0, 0, 0, 5]),
    ],
)
def test_a_value_without_finite_neighbours_has_a_marker(values, sizes):
    for chart in (
        line_chart([series(values=values)], LOSS, "nats"),
        time_chart(series(values=values, key="time/data_s")),
    ):
        (drawn,) = chart.data
        assert drawn.mode == "lines+markers" and list(drawn.marker.size) == sizes


def test_an_ordinary_curve_has_no_markers():
    assert line_chart([series()], LOSS, "nats").data[0].mode == "lines"
    assert time_chart(series(key="time/data_s")).data[0].mode == "lines"


def test_a_chart_escapes_the_names_of_runs():
    runs = [series("a<b>bold</b>&"), series("plain")]
    assert line_chart(runs, LOSS, "nats").data[0].name == "a&lt;b&gt;bold&lt;/b&gt;&amp;"
    assert goodput_chart(runs).data[0].y[0] == "a&lt;b&gt;bold&lt;/b&gt;&amp;"


def test_a_run_given_twice_is_drawn_once(tmp_path, monkeypatch):
    run = recorded(tmp_path)
    once = write_report([run], tmp_path / "once.html").read_text()
    monkeypatch.chdir(tmp_path)
    twice = write_report([open_run("runs/try"), run], tmp_path / "twice.html").read_text()
    assert twice.count('"type":"scatter"') == once.count('"type":"scatter"') > 0
    assert "Differences of the configs" not in twice


def test_a_run_in_the_working_folder_keeps_its_name(tmp_path, monkeypatch):
    run = recorded(tmp_path)
    (run.path / "code").mkdir()
    for folder, place in ((run.path, "."), (run.path / "code", "..")):
        monkeypatch.chdir(folder)
        assert open_run(place).name == "try"
    assert "<h1>try</h1>" in without_script(write_report([open_run("..")]).read_text())


def test_a_run_of_half_a_second_has_a_bar_and_a_run_without_time_has_none():
    accounts = {"short": Goodput(training_s=0.4, startup_s=0.1), "new": Goodput()}
    figure = goodput_chart([Series(name, {}, (), account) for name, account in accounts.items()])
    assert {bar.name: (bar.y, bar.x) for bar in figure.data} == {
        "startup": (("short",), (20.0,)), "training": (("short",), (80.0,)),
    }  # fmt: skip
