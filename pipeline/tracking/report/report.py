"""`pipeline report`: one HTML file that shows what happened in one or several runs."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, UsageError
from pipeline.files import is_regular, naming, open_regular, write_text
from pipeline.run.evaluations import evaluations
from pipeline.run.events import Checkpointed, EventLog, Ready, UnknownEvent
from pipeline.run.folder import Run
from pipeline.run.records import ancestry
from pipeline.text_format import printable, rounded_duration, short
from pipeline.tracking.report.charts import Series, goodput_chart, line_chart, time_chart, to_html
from pipeline.tracking.report.decays import decay_sections
from pipeline.tracking.report.page import Section, render
from pipeline.tracking.report.series import has_metrics, read_series
from pipeline.tracking.report.tasks import task_sections
from pipeline.tracking.upload.describe import as_text, checkpoints, flatten
from pipeline.vendor import plotly_js

_QUIET = (Ready, Checkpointed)  # shown elsewhere
_UNTOLD = ("began", "last_seen")
_CURVES = (  # metric, title, unit, note
    ("train/lr", "Learning rate", "learning rate", "Warm-up, then the schedule of the config."),
    ("train/grad_norm", "Gradient norm", "L2 norm", "Of the global batch, before clipping."),
    ("train/tokens_per_s", "Throughput", "tokens per second", "All processes together, mean over a log interval."),
    ("train/mfu", "MFU", "fraction of the peak", "Model FLOP/s over the devices' peak."),
    ("val/bits_per_byte", "Validation, bits per byte", "bits per byte of text", "Comparable between tokenizers."),
)
_TIME_NOTE = "Mean over a log interval, on rank 0."
_GOODPUT_NOTE = "Training: steps done for the first time. Everything else is overhead."
_EVENTS = 200
_SAMPLES = 5
_LONGEST_SAMPLE = 1 << 20


def write_report(runs: Sequence[Run], output: Path | None = None) -> Path:
    """Writes the report of one run, or of several overlaid, and returns its file: by default in the first run's folder.

    Raises:
        UsageError: No run has metrics yet.
        PipelineError: The file cannot be written.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())  # a run given twice is one curve
    names = [run.name for run in runs]
    # Paths tell runs of the same name apart.
    series = [read_series(run, run.name if names.count(run.name) == 1 else str(run.path)) for run in runs]
    if not has_metrics(series):
        raise UsageError(f"{runs[0].path}: nothing to report yet: metrics.jsonl is empty")
    title = " · ".join(s.name for s in series)
    alone = len(runs) == 1
    sections = [*_charts(series), *task_sections(runs, [s.name for s in series]), *_details(runs, series)]
    if alone:
        sections = [sections[0], *decay_sections(runs[0], series[0]), *sections[1:]]
    else:
        sections = [comparison(series), _differences(runs, series), *sections]
    return page(title, _tiles(runs[0], series[0]) if alone else [], sections, output or runs[0].report_file)


def readable(runs: Sequence[Run]) -> tuple[list[Run], list[PipelineError]]:
    """Returns the runs whose records can be read, and what is wrong with each other one.

    Raises:
        PipelineError: None can be read.
    """
    found: list[Run] = []
    problems: list[PipelineError] = []
    for run in runs:
        try:
            for read in (run.config, run.provenance, run.evaluation, lambda run=run: evaluations(run)):
                read()
        except PipelineError as error:
            problems.append(error)
        else:
            found.append(run)
    if problems and not found:
        raise problems[0]
    return found, problems


def page(title: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section], target: Path) -> Path:
    """Writes a page of figures and sections, and returns its file.

    Raises:
        PipelineError: The file cannot be written.
    """
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    with naming(target, "cannot be written", "choose another --output"):
        write_text(target, render(title, f"made {made} by pipeline report", plotly_js(), tiles, sections))
    return target


def _charts(series: Sequence[Series]) -> list[Section]:
    def has(key: str) -> bool:
        return any(key in s.curves for s in series)

    loss = [("train/loss", "training"), ("val/loss", "validation")]
    restarted = any(s.restarts for s in series)
    dotted = "Dotted: a run restarted or rolled back to this step." if restarted else ""
    made = [("Loss", dotted, line_chart(series, loss, "nats per token"), True)]
    if sources := _validation_sources(series):
        keys = [(f"val/{name}/loss", printable(name)) for name in sources]
        made.append(("Validation loss by source", "", line_chart(series, keys, "nats per token"), True))
    for key, title, unit, note in _CURVES:
        if has(key):
            chart = line_chart(series, [(key, title)], unit, log=key == "train/grad_norm")
            made.append((title, note, chart, False))
    made += [
        (f"Time of a step{'' if len(series) == 1 else ': ' + s.name}", _TIME_NOTE, time_chart(s), len(series) == 1)
        for s in series
        if "time/data_s" in s.curves or "time/forward_backward_s" in s.curves
    ]
    if any(s.goodput for s in series):
        made.append(("Goodput", _GOODPUT_NOTE, goodput_chart(series), True))
    return [
        Section(title, note, wide, html=to_html(figure, f"chart-{number}"))
        for number, (title, note, figure, wide) in enumerate(made)
    ]


def _validation_sources(series: Sequence[Series]) -> list[str]:
    """Returns the sources with a validation loss of their own, if there are several."""
    keys = dict.fromkeys(key for s in series for key in s.curves if re.fullmatch("val/.+/loss", key))
    return [key.removeprefix("val/").removesuffix("/loss") for key in keys] if len(keys) > 1 else []


def _tiles(run: Run, series: Series) -> list[tuple[str, str]]:
    figures = []
    for key, label, form in (
        ("train/loss", "last training loss", "{:.4f}"),
        ("val/loss", "last validation loss", "{:.4f}"),
        ("val/perplexity", "validation perplexity", "{:.1f}"),
        ("val/bits_per_byte", "bits per byte", "{:.3f}"),
    ):
        if key in series.curves:
            figures.append((label, form.format(series.curves[key].values[-1])))
    last = max((c.steps[-1] for c in series.curves.values()), default=0)
    figures.insert(0, (f"of {run.config().train.max_iters:,} steps", f"{last:,}"))
    if "train/tokens_seen" in series.curves:
        figures.append(("tokens seen", short(series.curves["train/tokens_seen"].values[-1])))
    if series.goodput is not None:
        figures.append(("goodput", f"{100 * series.goodput.fraction:.1f}%"))
        figures.append(("wall time", rounded_duration(series.goodput.wall_s)))
    if series.usage is not None:
        if series.usage.allocations:
            figures.append(_unit_and_value(series.usage.hours()))
        kwh = {"energy of the GPUs": series.usage.gpu_kwh, "energy of the nodes": series.usage.node_kwh}
        measured = [(label, f"{value:,.3f} kWh") for label, value in kwh.items() if value is not None]
        figures += measured or [("energy", "not measured")]
    figures.append(("restarts and rollbacks", str(len(series.restarts))))
    return figures


def _unit_and_value(text: str) -> tuple[str, str]:
    value, unit = text.split()
    return unit, value


def comparison(series: Sequence[Series]) -> Section:
    """Returns a table of runs: losses, speed, goodput and cost."""
    rows = []
    for s in series:
        losses = [f"{s.curves[k].values[-1]:.4f}" if k in s.curves else "" for k in ("train/loss", "val/loss")]
        speed = s.curves.get("train/tokens_per_s")
        middle = f"{sorted(speed.values)[len(speed.values) // 2]:,.0f}" if speed else ""
        last = max((c.steps[-1] for c in s.curves.values()), default=0)
        good = f"{100 * s.goodput.fraction:.1f}% of {rounded_duration(s.goodput.wall_s)}" if s.goodput else ""
        allocated = s.usage.hours() if s.usage and s.usage.allocations else ""
        cost = [allocated, s.usage.energy() if s.usage else "not measured"]
        rows.append([s.name, f"{last:,}", *losses, middle, good, *cost, str(len(s.restarts))])
    head = ["run", "step", "training loss", "validation loss", "tokens/s (median)", "goodput"]
    head += ["allocated", "energy", "restarts"]
    return Section("Runs", wide=True, head=head, rows=rows)


def _differences(runs: Sequence[Run], series: Sequence[Series]) -> Section:
    configs = [dict(flatten(run.config().model_dump(mode="json"))) for run in runs]
    rows = []
    for key in dict.fromkeys(k for config in configs for k in config):
        values = [json.dumps(c[key], ensure_ascii=False) if key in c else "" for c in configs]
        if len(set(values)) > 1 and key != "name":
            rows.append([key, *values])
    title = "Differences of the configs"
    if not rows:
        return Section(title, wide=True, html="<p>The configs are the same.</p>")
    return Section(title, wide=True, head=["setting", *(s.name for s in series)], rows=rows)


def _details(runs: Sequence[Run], series: Sequence[Series]) -> list[Section]:
    made = []
    for run, s in zip(runs, series, strict=True):
        of = "" if len(runs) == 1 else f": {s.name}"
        made.append(_samples(run, of))
        evaluation = _evaluation(run)
        if evaluation:
            made.append(Section(f"Evaluation{of}", head=["on the whole validation split", ""], rows=evaluation))
        origin = ancestry(run.origin())
        if origin:
            made.append(Section(f"Started from{of}", wide=True, head=["the nearest first"], rows=[[o] for o in origin]))
        made += [_incidents(run, of), _provenance(run, of)]
        config = run.config_text()
        made.append(Section(f"Config{of}", wide=True, texts=[(run.config_file.name, config)]))
        saved = [[f"{c['step']:,}", c["path"], (c["digest"] or "")[:16]] for c in checkpoints(run)][-20:]
        if saved:
            head = ["step", "path", "SHA-256 of its manifest"]
            made.append(Section(f"Checkpoints{of}", wide=True, head=head, rows=saved))
    return made


def _samples(run: Run, of: str) -> Section:
    # A link could publish any file of the user.
    files = [file for file in sorted(run.samples.glob("*.txt")) if is_regular(file, run.path)]
    texts = [(printable(f.stem), _beginning(f, run)) for f in files[-_SAMPLES:]]
    if not texts:
        return Section(f"Samples{of}", html="<p>None yet: <code>pipeline sample RUN</code></p>")
    return Section(f"Samples{of}", texts=texts, opened=texts[-1][0])


def _beginning(file: Path, run: Run) -> str:
    with open_regular(file, run.path) as source:
        return source.read(_LONGEST_SAMPLE).decode(errors="replace")


def _evaluation(run: Run) -> list[list[str]]:
    found = run.evaluation()
    if found is None:
        return []
    return [
        ["step", f"{found['step']:,}"],
        ["loss, nats per token", f"{found['loss']:.4f}"],
        ["perplexity", f"{found['perplexity']:.2f}"],
        ["bits per byte of text", f"{found['bits_per_byte']:.4f}"],
        ["tokens", f"{found['tokens']:,}"],
        *(
            [printable(name), f"loss {s['loss']:.4f}, {s['bits_per_byte']:.4f} bits per byte, {s['tokens']:,} tokens"]
            for name, s in found.get("sources", {}).items()
            if len(found["sources"]) > 1
        ),
    ]


def _incidents(run: Run, of: str) -> Section:
    rows = []
    for event in [e for e in EventLog.load(run.events_file) if not isinstance(e, _QUIET)][-_EVENTS:]:
        when = datetime.fromtimestamp(event.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        told = {name: value for name, value in event.fields().items() if name not in _UNTOLD}
        rest = ", ".join(f"{name}: {_plain(value)}" for name, value in told.items() if value not in (None, False))
        rows.append([when, event.name if isinstance(event, UnknownEvent) else event.kind, rest])
    return Section(f"Starts, stops and incidents{of}", head=["time (UTC)", "event", ""], rows=rows)


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _provenance(run: Run, of: str) -> Section:
    starts = run.provenance()
    if not starts:
        return Section(f"Provenance{of}", html="<p>None.</p>")
    values = dict(flatten(starts[-1]))
    rows = [[key, as_text(value)] for key, value in values.items()]
    return Section(f"Provenance{of}", head=[f"start {len(starts)} of {len(starts)}", ""], rows=rows)
