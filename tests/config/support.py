"""The demo config with changes, and what is reported about it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import parse_config
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def tree(**changes: Any) -> dict[str, Any]:
    """The demo config with dotted changes; None removes a key."""
    result = copy.deepcopy(yaml.safe_load(DEMO.read_text()))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = result
        for section in sections:
            node = node[int(section)] if isinstance(node, list) else node.setdefault(section, {})
        if value is None:
            node.pop(key)
        else:
            node[key] = value
    return result


def problems(world_size: int = 1, overrides: tuple[str, ...] = (), **changes: Any) -> dict[str, str]:
    """What is wrong with the changed demo config: messages by path, each path once."""
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(tree(**changes)), overrides, world_size=world_size)
    found = {problem.path: problem.message for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    return found
