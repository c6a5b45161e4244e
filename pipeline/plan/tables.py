"""A plan as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from pipeline.config.sections import Config
from pipeline.plan.devices import GIB
from pipeline.plan.plan import Cluster, PlanRow, Range
from pipeline.plan.step_time import ARITHMETIC, LINKS
from pipeline.text_format import figure


def print_plan(config: Config, rows: Sequence[PlanRow], cluster: Cluster, console: Console) -> None:
    """Prints memory, speed and failures as tables, and the inputs they rest on."""
    for table in (_memory(config, rows), _stages(rows), _speed(config, rows), _failures(config, rows)):
        console.print(table)
    for line in _notes(config, rows, cluster):
        console.print(line, soft_wrap=True, markup=False)


def _memory(config: Config, rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "ranks", "weights", "gradients", "optimizer", "activations", "buffers", "peak", "fits")
    table = _table(f"GiB per process, ZeRO stage {config.train.zero_stage}", *columns)
    for row in rows:
        memory = row.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.buffers, memory.peak)
        table.add_row(
            f"{row.nodes}", f"{row.ranks}", *map(_gib, parts), {True: "yes", False: "NO", None: "?"}[row.fits]
        )
    return table


def _stages(rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "stage 0", "stage 1", "stage 2", "stage 3", "host memory", "peak is in")
    table = _table("peak GiB at each ZeRO stage", *columns)
    for row in rows:
        memory = row.memory
        table.add_row(f"{row.nodes}", *map(_gib, row.peak_by_stage), _gib(memory.host), memory.moment)
    return table


def _speed(config: Config, rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "batch", "step s", "communication s", "tokens/s", "efficiency", "days")
    table = _table(f"time, at the slowest and at the fastest; days to {config.train.max_iters:,} steps", *columns)
    for row in rows:
        grown = "*" if row.batch_size != config.train.batch_size else ""
        efficiency = f"{100 * row.efficiency[0]:.0f}-{100 * row.efficiency[1]:.0f}%"
        times = (row.step_s, row.communication_s, row.tokens_per_s)
        table.add_row(f"{row.nodes}", f"{row.batch_size}{grown}", *map(_between, times), efficiency, _between(row.days))
    return table


def _failures(config: Config, rows: Sequence[PlanRow]) -> Table:
    columns = ("nodes", "GB", "save s", "hours between failures", "goodput", "best every", "goodput then")
    table = _table(f"checkpoints and failures; a checkpoint every {config.train.checkpoint_interval:,} steps", *columns)
    for row in rows:
        figures = map(figure, (row.checkpoint_gb, row.save_s, row.mtbf_hours))
        best = f"{row.best_interval_steps:,} steps"
        table.add_row(f"{row.nodes}", *figures, f"{row.goodput:.1%}", best, f"{row.best_goodput:.1%}")
    return table


def _notes(config: Config, rows: Sequence[PlanRow], cluster: Cluster) -> list[str]:
    device = cluster.device
    notes = []
    if any(row.batch_size != config.train.batch_size for row in rows):
        notes.append(
            f"* train.batch_size {config.train.batch_size} cannot be shared by so many processes with "
            f"train.micro_batch_size {config.train.micro_batch_size}; planned with the next larger batch that can"
        )
    notes.append(
        f"{device.name}: {device.flops_per_s(config.train.precision) / 1e12:g} TFLOP/s in {config.train.precision}, of "
        f"which {ARITHMETIC[0]:.0%} to {ARITHMETIC[1]:.0%}; {cluster.per_node} per node, {cluster.intra_gb_per_s:g} "
        f"GB/s inside a node, {cluster.inter_gb_per_s:g} GB/s per node between nodes, of which {LINKS[0]:.0%} to "
        f"{LINKS[1]:.0%}"
    )
    notes.append(
        f"storage {cluster.storage_gb_per_s:g} GB/s; a node fails every {cluster.mtbf_node_hours:,.0f} hours; "
        f"a restart takes {cluster.restart_s:g} s. The model and its limits: docs/scaling.md"
    )
    return notes


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.justify = "right"
    return table


def _gib(size: float) -> str:
    return figure(size / GIB)


def _between(values: Range) -> str:
    return f"{figure(values[0])}-{figure(values[1])}"
