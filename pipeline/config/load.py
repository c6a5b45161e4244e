"""YAML and dotted overrides -> a validated `Config`, or everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.config.section_base import wrong_value
from pipeline.config.sections import Config
from pipeline.config.yaml_tree import Vocabulary, dump
from pipeline.errors import Problem

CONFIG = Vocabulary(Config, "config", "configs/demo.yaml")


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """Reads a config file and applies overrides.

    Args:
        path: The YAML file.
        overrides: `dotted.key=value` strings; values are parsed as YAML.
        world_size: Number of processes that will train; they must share the global batch evenly.

    Raises:
        UsageError: The file cannot be read.
        ConfigError: Everything that is wrong with the file and the overrides.
    """
    return parse_config(CONFIG.read(path), overrides, source=str(path), world_size=world_size)


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "config", world_size: int = 1) -> Config:
    """Does what `load_config` does with the text of a file; `source` names it in messages."""

    def batch_is_shared_evenly(config: Config) -> Iterator[Problem]:
        batch, micro_batch = config.train.batch_size, config.train.micro_batch_size
        if batch % (micro_batch * world_size):
            product = f"{micro_batch} x {world_size} = {micro_batch * world_size}"
            yield wrong_value("train.batch_size", batch, f"a multiple of micro_batch_size x world size = {product}")

    def node_copies_divide_the_ranks(config: Config) -> Iterator[Problem]:
        zero = config.deepspeed.get("zero_optimization")
        ranks = zero.get("zero_hpz_partition_size") if isinstance(zero, dict) else None
        # A config is also read by commands that train nothing, in one process.
        if world_size > 1 and isinstance(ranks, int) and ranks > 0 and world_size % ranks:
            path = "deepspeed.zero_optimization.zero_hpz_partition_size"
            yield wrong_value(path, ranks, f"the ranks of a node, a divisor of the world size = {world_size}")

    return CONFIG.parse(text, source, overrides, [batch_is_shared_evenly, node_copies_divide_the_ranks])


def dump_config(config: Config) -> str:
    """Returns the resolved config as YAML that `parse_config` reads back to an equal tree."""
    return dump(config)
