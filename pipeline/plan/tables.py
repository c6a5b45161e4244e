"""A plan as tables on the terminal, none wider than 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.config.sections import Config
from pipeline.model.flops import num_parameters
from pipeline.plan.devices import GIB
from pipeline.plan.plan import Cluster, PlanRow, Range
from pipeline.plan.step_time import FAST, SLOW
from pipeline.text_format import count, figure


def print_plan(config: Config, rows: Sequence[PlanRow], cluster: Cluster, console: Console) -> None:
    """Prints what is planned, then memory, speed, cost and failures as tables, and the inputs they rest on."""
    for line in (*_refusals(rows), *_header(config, cluster)):
        console.print(line)
    console.print()
    expected = [_expected(rows, cluster)] if rows[0].expected else []
    tables = (
        _memory(config, rows, cluster), _stages(rows), _speed(config, rows), _cost(config, rows, cluster), *expected,
        _failures(config, rows),
    )  # fmt: skip
    for table in tables:
        console.print(table)
    for line in _notes(config, rows, cluster):
        console.print(line)


def _refusals(rows: Sequence[PlanRow]) -> list[str]:
    """Returns what training would refuse, and on how many nodes."""
    lines = []
    for problem in dict.fromkeys(problem for row in rows for problem in row.refused):
        nodes = ", ".join(f"{row.nodes}" for row in rows if problem in row.refused)
        lines.append(f"WARNING: on {nodes} node{'' if nodes == '1' else 's'} training refuses {problem}")
    return lines


def _header(config: Config, cluster: Cluster) -> list[str]:
    train, device = config.train, cluster.device
    tokens = train.batch_size * config.model.context_length
    memory = f" with {device.memory_gib:.0f} GiB" if device.memory_gib else ""
    lacking = device.lacks(train.precision)
    return [
        *([f"WARNING: {lacking}; train.precision=fp32"] if lacking else []),
        f"{config.name}: {count(num_parameters(config.model))} parameters; {count(tokens)} tokens per step, "
        f"{count(tokens * train.max_iters)} in {train.max_iters:,} steps",
        f"on nodes of {cluster.per_node} x {device.name}{memory}, "
        f"{device.flops_per_s(train.precision) / 1e12:g} TFLOP/s in {train.precision}",
    ]


def _memory(config: Config, rows: Sequence[PlanRow], cluster: Cluster) -> Table:
    gib = cluster.device.memory_gib
    room = f", of {gib:.0f} GiB" if gib else ""
    columns = ("nodes", "weights", "gradients", "optimizer", "activations", "buffers", "peak", "fits")
    table = _table(f"GiB per process{room}; ZeRO stage {config.train.zero_stage}", *columns)
    for row in rows:
        memory = row.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers, memory.peak)
        fits = {True: "yes", False: "NO", None: "?"}[row.fits]
        table.add_row(f"{row.nodes}", *map(_gib, parts), fits)
    return table


def _stages(rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "stage 0", "stage 1", "stage 2", "stage 3", "host memory", "peak is in")
    table = _table("peak GiB at each ZeRO stage", *columns)
    for row in rows:
        memory = row.memory
        table.add_row(f"{row.nodes}", *map(_gib, row.peak_by_stage), _gib(memory.host), memory.moment)
    return table


def _speed(config: Config, rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "batch", "step s", "network s", "efficiency", "MFU", "tokens/s")
    table = _table("time, at the slowest and at the fastest", *columns)
    for row in rows:
        grown = "*" if row.batch_size != config.train.batch_size else ""
        shares = (_percent(row.efficiency), _percent(row.mfu))
        times = (_between(row.step_s), _between(row.communication_s))
        table.add_row(f"{row.nodes}", f"{row.batch_size}{grown}", *times, *shares, _between(row.tokens_per_s))
    return table


def _cost(config: Config, rows: Sequence[PlanRow], cluster: Cluster) -> Table:
    unit, price = _unit(cluster), cluster.price_per_device_hour
    columns = ["nodes", f"{unit}s", f"tok/s/{unit}", "days", f"{unit}-hours", "node-hours"]
    title = f"{config.train.max_iters:,} steps"
    if price is not None:
        columns.append("cost")
        title += f"; cost at {price:g} per {unit}-hour"
    table = _table(title, *columns)
    for row in rows:
        figures = [row.tokens_per_device_s, row.days, row.device_hours, row.node_hours]
        if row.cost is not None:
            figures.append(row.cost)
        table.add_row(f"{row.nodes}", f"{row.ranks}", *map(_between, figures))
    return table


def _expected(rows: Sequence[PlanRow], cluster: Cluster) -> Table:
    unit, price = _unit(cluster), cluster.price_per_device_hour
    columns = ["nodes", "step s", "MFU", "tokens/s", f"tok/s/{unit}", "days", f"{unit}-hours"]
    table = _table("between these bounds, as published runs lead one to expect", *columns, *(["cost"] if price else []))
    for row in rows:
        if (found := row.expected) is not None:
            rates = map(_figure, (found.tokens_per_s, found.tokens_per_s / row.ranks, found.days, found.device_hours))
            cost = [_figure(found.cost)] if found.cost else []
            table.add_row(f"{row.nodes}", _figure(found.step_s), f"{100 * found.mfu:.0f}%", *rates, *cost)
    return table


def _failures(config: Config, rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "GB", "save s", "hours to failure", "goodput", "best every", "goodput then")
    table = _table(f"checkpoints and failures; a checkpoint every {config.train.checkpoint_interval:,} steps", *columns)
    for row in rows:
        figures = map(_figure, (row.checkpoint_gb, row.save_s, row.mtbf_hours))
        best = f"{row.best_interval_steps:,} step{'s' if row.best_interval_steps > 1 else ''}"
        table.add_row(f"{row.nodes}", *figures, f"{row.goodput:.1%}", best, f"{row.best_goodput:.1%}")
    return table


def _notes(config: Config, rows: Sequence[PlanRow], cluster: Cluster) -> list[str]:
    notes = []
    products = cluster.device.products
    likely = f", {products.expected:.0%} expected" if rows[0].expected else ""
    if any(row.batch_size != config.train.batch_size for row in rows):
        notes.append(
            f"* train.batch_size {config.train.batch_size} cannot be shared by so many processes with "
            f"train.micro_batch_size {config.train.micro_batch_size}; planned with the next larger batch that can, and "
            "with more tokens in as many steps"
        )
    notes += [
        "efficiency: the share of a step in which the devices compute; the rest is communication and the optimizer. "
        "MFU: the model's own FLOP/s, without recomputation, as a share of the devices' peak.",
        f"assumed: {products.lowest:.0%} to {products.highest:.0%} of the peak in matrix products{likely}; "
        f"{cluster.intra_gb_per_s:g} GB/s inside a node and {cluster.inter_gb_per_s:g} GB/s per node between nodes, of "
        f"which {SLOW[0]:.0%} to {FAST[0]:.0%}; storage {cluster.storage_gb_per_s:g} GB/s; a node fails every "
        f"{cluster.mtbf_node_hours:,.0f} hours; a restart takes {cluster.restart_s:g} s. Hours and days include "
        "failures. The model and its limits: docs/scaling.md",
    ]
    return notes


def _unit(cluster: Cluster) -> str:
    return "core" if cluster.on_cpu else "GPU"


def _table(title: str, *columns: str) -> Table:
    table = Table(
        *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for column in table.columns:
        column.justify = "right"
    return table


def _gib(size: float) -> str:
    return _figure(size / GIB)


def _between(values: Range) -> str:
    low, high = map(_figure, values)
    return low if low == high else f"{low}-{high}"


def _figure(value: float) -> str:
    """Two or three digits in at most five characters: more decimals would make a table wider than a terminal."""
    if value >= 0.1:
        return figure(value)
    return f"{value:.3f}" if value >= 0.0005 else "0"


def _percent(values: Range) -> str:
    return f"{100 * values[0]:.0f}-{100 * values[1]:.0f}%"
