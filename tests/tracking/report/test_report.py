import json
import math
import re
import time

import pytest

from pipeline.errors import UsageError
from pipeline.files import write_json, write_text
from pipeline.run import attempts
from pipeline.run.attempts import AttemptBegan, AttemptEnded, Charged
from pipeline.run.events import Finished, Preempted, Resumed, Started
from pipeline.run.folder import open_run
from pipeline.tracking.goodput import Goodput
from pipeline.tracking.report.charts import Curve, Series, colour_of, goodput_chart, line_chart, time_chart
from pipeline.tracking.report.report import write_report
from tests.launch.support import BASE, FIRST, branched
from tests.tracking.support import begin, make_run

LONG = ("train/loss", "val/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "train/mfu",
        "val/bits_per_byte")  # fmt: skip


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


def test_the_page_of_a_branch_names_its_ancestors(tmp_path):
    own = without_script(write_report([branched(recorded(tmp_path))]).read_text())
    ancestors = own.split("Started from")[1].split("</table>")[0]
    assert BASE["from"] in ancestors and "step 4" in ancestors and FIRST["from"] in ancestors


def test_the_page_of_a_long_run_is_smaller_than_a_megabyte_and_a_half(tmp_path):
    run = recorded(tmp_path)
    keys = [*LONG, "data_s", "forward_backward_s", "optimizer_s", "checkpoint_stall_s"]
    with run.metrics_file.open("a") as out:
        for step in range(50, 60_000):
            values = {key if "/" in key else f"time/{key}": math.sin(step * (n + 1)) / 7 for n, key in enumerate(keys)}
            out.write(json.dumps({"step": step, "time": 1e9 + step, **values}) + "\n")
    assert 1_200_000 < write_report([run]).stat().st_size < 1_500_000


def test_a_sample_cannot_run_as_a_script_in_the_page(tmp_path):
    own = without_script(write_report([recorded(tmp_path)]).read_text())
    assert "alert('sampled')" not in own and "&lt;script&gt;alert(&#39;sampled&#39;)" in own


def test_validation_by_source_is_one_chart_with_a_line_per_source(tmp_path):
    """However many sources there are; a single one has the same loss as the whole, and no chart."""
    run, config = make_run(tmp_path, "none")
    tracker = begin(run, config)
    names = [f"source-{number}" for number in range(12)]
    for step in (10, 20):
        losses = {f"val/{name}/loss": 3.0 + number / step for number, name in enumerate(names)}
        tracker.log(step, {"train/loss": 3.0, "val/loss": 3.0, **losses})
    tracker.close("FINISHED")
    write_json(run.evaluation_file, {
        "step": 20, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.0, "tokens": 9,
        "sources": {name: {"loss": 3.0, "bits_per_byte": 1.2345, "tokens": 4} for name in names},
    })  # fmt: skip
    own = without_script(write_report([run]).read_text())
    assert own.count("Validation loss by source") == 1
    assert all(own.count(f'"name":"{name}"') == 1 for name in names)
    assert "1.2345" in own
    assert "by source" not in without_script(write_report([recorded(tmp_path / "other")]).read_text())


def test_several_runs_are_overlaid_and_their_configs_compared(tmp_path):
    first = recorded(tmp_path)
    second = recorded(tmp_path, "name=other", "optimizer.learning_rate=2.0e-3", scale=0.9)
    own = without_script(write_report([first, second], tmp_path / "both.html").read_text())
    assert "try training" in own and "other training" in own
    differences = own.split("Differences of the configs")[1].split("</table>")[0]
    assert "optimizer.learning_rate" in differences and "0.002" in differences and "model.d_model" not in differences


def test_the_page_shows_what_a_run_cost_and_says_where_nothing_was_measured(tmp_path):
    run = recorded(tmp_path)
    assert "GPU-hours" not in without_script(write_report([run]).read_text()), "it had no allocation"
    now = time.time()
    attempts.note(run, AttemptBegan(time=now - 7200, stage="train", job="7", gpus=8, cpus=64))
    attempts.note(run, AttemptEnded(time=now - 3600, stage="train", job="7"))
    own = without_script(write_report([run]).read_text())
    assert "8.00" in own and "GPU-hours" in own and "not measured" in own
    attempts.note(run, Charged(job="7", began=now - 7260, seconds=5400, gpus=8, cpus=64, energy_j=7.2e6))
    own = without_script(write_report([run]).read_text())
    assert "12.00" in own and "2.000 kWh" in own and "not measured" not in own
    other = recorded(tmp_path, "name=other")
    both = without_script(write_report([run, other], tmp_path / "both.html").read_text())
    assert "12.00 GPU-hours" in both and "2.000 kWh" in both and "not measured" in both


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


def test_every_restart_is_a_line_in_the_color_of_its_run_that_names_it_when_pointed_at():
    runs = [series(restarts=range(300)), series("other", restarts=range(300))]
    chart = line_chart(runs, LOSS, "nats")
    first, last = [drawn for drawn in chart.data if drawn.yaxis == "y2"]
    assert list(first.x[:4]) == [0, 0, 0, None] and len(first.x) == 1200
    assert (first.y[0], first.y[2]) == (0, 1) == tuple(chart.layout.yaxis2.range)
    assert first.line.color != last.line.color and first.line.color == chart.data[0].line.color
    assert last.hovertemplate.startswith("other restarted at step %{x}") and last.text is None


def test_few_restarts_are_named_in_writing_where_a_chart_has_the_whole_width():
    wide = [*LOSS, ("val/loss", "validation")]
    runs = [series(restarts=[1]), series("a<b", restarts=[1, 2])]
    names = [[t for t in drawn.text if t] for drawn in line_chart(runs, wide, "nats").data if drawn.text]
    assert names == [["try restarted"], ["a&lt;b restarted"] * 2]
    (alone,) = [drawn.text for drawn in line_chart(runs[:1], wide, "nats").data if drawn.text]
    assert "restart" in alone
    assert not any(drawn.text for drawn in line_chart(runs, LOSS, "nats").data)


def test_a_legend_stands_below_the_plot_and_makes_the_chart_higher_not_the_plot_lower():
    heights = []
    for count in (2, 12):
        layout = line_chart([series(f"run-{number}") for number in range(count)], LOSS, "nats").layout
        assert (layout.legend.y, layout.legend.yref, layout.legend.yanchor) == (0, "container", "bottom")
        heights.append(layout.height - layout.margin.t - layout.margin.b)
    assert heights[0] == heights[1] > 200


def test_a_constant_is_drawn_above_zero_not_within_one_of_itself():
    assert line_chart([series(values=[1e-3] * 3)], LOSS, "rate").layout.yaxis.rangemode == "tozero"
    assert line_chart([series(values=[1e-3, 2e-3])], LOSS, "rate").layout.yaxis.rangemode is None


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ([3.0], [5]),
        ([3.0, math.nan, *[1.0] * 50, math.inf, 1.0], [5, *[0] * 52, 5]),
    ],
)
def test_a_value_without_finite_neighbours_has_a_marker(values, sizes):
    for chart in (
        line_chart([series(values=values)], LOSS, "nats"),
        time_chart(series(values=values, key="time/data_s")),
    ):
        (drawn,) = chart.data
        assert drawn.mode == "lines+markers" and list(drawn.marker.size) == sizes


@pytest.mark.parametrize(("points", "mode"), [(2, "lines+markers"), (40, "lines+markers"), (41, "lines")])
def test_few_points_have_markers_and_an_ordinary_curve_has_none(points, mode):
    values = range(1, points + 1)
    assert line_chart([series(values=values)], LOSS, "nats").data[0].mode == mode
    assert time_chart(series(values=values, key="time/data_s")).data[0].mode == mode


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


def test_every_run_of_a_large_sweep_has_a_colour_of_its_own():
    assert len({colour_of(number) for number in range(64)}) == 64
