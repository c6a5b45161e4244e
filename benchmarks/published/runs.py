"""The published runs of models.csv, runs.csv and sources.csv, each as a config and a cluster of `pipeline plan`."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.load import load_config
from pipeline.config.sections import Config
from pipeline.plan.devices import Device, device_named
from pipeline.plan.step_time import Network, expected_step_time, step_time_bounds

FOLDER = Path(__file__).parent
BASE = FOLDER.parents[1] / "configs" / "demo.yaml"


@dataclass(frozen=True)
class Source:
    """Where figures were published."""

    name: str
    """The project."""
    place: str
    """Repository, path and commit; of this project, the file."""
    date: str
    """When the figures were published."""
    notes: str
    """Which rows were taken, and what their source does not say."""


@dataclass(frozen=True)
class Run:
    """A published run, and what `pipeline plan` says of it."""

    source: str
    """Key of its source."""
    model: str
    """Key of its model."""
    device: Device
    """The device of each rank."""
    network: Network
    """Nodes and links; the device's usual links where the source names none."""
    config: Config
    """The run as an experiment of this project: the same matrices, batch, sharding and recomputation."""
    published: str
    """The figure, as it was published, with its unit."""
    step_s: float
    """Seconds per step that follow from the published figure."""
    calibrates: bool
    """Whether the constants of the time model were fitted to it; if not, it was held back."""
    why: str
    """Why it is more than 10% off; empty if it is not."""

    @property
    def bounds_s(self) -> tuple[float, float]:
        """Seconds of the fastest and of the slowest step by the plan."""
        times = step_time_bounds(self.config, self.device, self.network, self.config.train.batch_size)
        return times[0].total_s, times[-1].total_s

    @property
    def expected_s(self) -> float | None:
        """Seconds of a step as the plan expects; None for a device without an expectation."""
        time = expected_step_time(self.config, self.device, self.network, self.config.train.batch_size)
        return time.total_s if time else None

    @property
    def speed(self) -> float | None:
        """The published speed as a multiple of the expected one; None for a device without an expectation."""
        return self.expected_s / self.step_s if self.expected_s else None

    @property
    def near(self) -> bool:
        """Whether the expected step is within 10% of the published one."""
        return self.speed is not None and abs(self.speed - 1) <= 0.1

    @property
    def inside(self) -> bool:
        """Whether the published step lies within the plan's bounds."""
        fastest, slowest = self.bounds_s
        return fastest <= self.step_s <= slowest


def sources() -> dict[str, Source]:
    """Returns the sources by their keys."""
    found = {}
    for row in _table("sources.csv"):
        at = f" at {row['commit'][:10]}" if row["commit"] else ""
        place = " ".join(part for part in (row["repository"], row["path"]) if part) + at
        found[row["source"]] = Source(row["name"], place, row["date"], row["notes"])
    return found


def published_runs() -> Iterator[Run]:
    """Yields all runs, in the order of the table."""
    models = {row["model"]: row for row in _table("models.csv")}
    for row in _table("runs.csv"):
        device = device_named(row["device"])
        between = float(row["inter_gb_per_s"] or device.inter_gb_per_s)
        network = Network(int(row["nodes"]), int(row["per_node"]), device.intra_gb_per_s, between)
        config = _config(models[row["model"]], row, network.ranks)
        yield Run(
            source=row["source"],
            model=row["model"],
            device=device,
            network=network,
            config=config,
            published=f"{row['published']} {row['unit']}",
            step_s=_step_s(float(row["published"]), row["unit"], config, network.ranks),
            calibrates=row["calibrates"] == "yes",
            why=row["why"],
        )


def _table(name: str) -> Iterator[dict[str, str]]:
    with (FOLDER / name).open(newline="") as file:
        yield from csv.DictReader(file)


def _step_s(figure: float, unit: str, config: Config, ranks: int) -> float:
    tokens = config.train.batch_size * config.model.context_length
    return {"s/step": figure, "tokens/s": tokens / figure, "tokens/s/GPU": tokens / figure / ranks}[unit]


def _config(model: dict[str, str], row: dict[str, str], ranks: int) -> Config:
    """Returns the experiment; of a feed-forward of two matrices, models.csv holds the width of three as large ones."""
    stage = int(row["zero_stage"])
    sizes = ("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "d_ff")
    overrides = {f"model.{key}": model[key] for key in sizes} | {
        "model.tie_embeddings": "true" if model["tied"] == "yes" else "false",
        "model.context_length": row["context"],
        "model.qk_norm": "false",
        "train.batch_size": str(ranks * int(row["micro_batch"]) * int(row["micro_batches"])),
        "train.micro_batch_size": row["micro_batch"],
        "train.precision": "bf16",
        "train.zero_stage": row["zero_stage"],
        "train.activation_checkpointing": row["recomputes"],
        "train.compile": "true" if row["compiled"] == "yes" else "false",
    }
    if stage and row["reduces_in"] == "fp32":
        overrides["deepspeed.communication_data_type"] = "fp32"
    if stage in (1, 2):
        overrides["train.overlap_comm"] = "true"
    return load_config(str(BASE), [f"{key}={value}" for key, value in overrides.items()])
