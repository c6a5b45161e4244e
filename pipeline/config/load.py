"""YAML and dotted overrides -> a validated `Config`, or everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config.messages.foreign_keys import CONFIG_KEYS
from pipeline.config.section_base import wrong_value
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import Vocabulary, dump
from pipeline.errors import Problem

CONFIG = Vocabulary(Config, "config", "configs/demo.yaml", CONFIG_KEYS)


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int | None = None) -> Config:
    """Reads a config file and applies overrides.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` strings; values are parsed as YAML.
        world_size: Number of processes that will train, if that is known; they must share the global batch evenly.

    Raises:
        UsageError: The file cannot be read.
        ConfigError: Everything that is wrong with the file and the overrides.
    """
    return parse_config(CONFIG.read(path), overrides, source=str(path), world_size=world_size)


def parse_config(
    text: str, overrides: Sequence[str] = (), source: str = "config", world_size: int | None = None
) -> Config:
    """Does what `load_config` does with the text of a file; `source` names it in messages."""

    def batch_is_shared_evenly(config: Config) -> Iterator[Problem]:
        batch, micro_batch, ranks = config.train.batch_size, config.train.micro_batch_size, world_size or 1
        if batch % (micro_batch * ranks):
            product = f"{micro_batch} x {ranks} = {micro_batch * ranks}"
            yield wrong_value("train.batch_size", batch, f"a multiple of micro_batch_size x world size = {product}")

    def what_the_ranks_need(config: Config) -> Iterator[Problem]:
        return problems_of_ranks(config, world_size) if world_size is not None else iter(())

    return CONFIG.parse(text, source, overrides, [batch_is_shared_evenly, what_the_ranks_need])


def problems_of_ranks(config: Config, ranks: int) -> Iterator[Problem]:
    """Yields what so many processes cannot train, but for a batch that they cannot share."""
    zero, train = config.deepspeed.get("zero_optimization"), config.train
    copies = zero.get("zero_hpz_partition_size") if isinstance(zero, dict) else None
    if isinstance(copies, int) and copies > 0 and ranks % copies:
        path = "deepspeed.zero_optimization.zero_hpz_partition_size"
        yield wrong_value(path, copies, f"the ranks of a node, a divisor of the world size = {ranks}")
    if train.precision == "bf16" and train.zero_stage == 1 and train.batch_size > train.micro_batch_size * ranks:
        cure = "2, which adds them up in float32: at stage 1 a step's micro-batches would be added up in bf16"
        yield wrong_value("train.zero_stage", 1, cure)


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML that `parse_config` reads back to an equal tree."""
    return dump(config)
