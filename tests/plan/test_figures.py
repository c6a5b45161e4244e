"""The figures that engines and published runs have confirmed do not drift.

The slow tests of test_memory.py measure engines; this one notices a changed formula within milliseconds. Where a change
is meant, and the slow tests pass: python -m tests.plan.test_figures > tests/plan/figures.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.devices import DEVICES
from pipeline.plan.memory import process_memory
from pipeline.plan.plan import make_plan
from tests.plan.published import cluster_of, llama

RECORDED = Path(__file__).with_name("figures.json")
CASES: dict[str, dict[str, Any]] = {
    "stage 0 in float32": {"precision": "fp32"},
    "stage 0 with one micro-batch": {"batch_size": 64},
    "stage 0 recomputed": {"activation_checkpointing": True},
    "stage 1 recomputed": {"zero_stage": 1, "activation_checkpointing": True, "batch_size": 256},
    "stage 1 in float32": {"zero_stage": 1, "precision": "fp32", "overlap_comm": True},
    "stage 2 recomputed": {"zero_stage": 2, "activation_checkpointing": True, "micro_batch_size": 2},
    "stage 2 offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "stage 3 recomputed": {"zero_stage": 3, "activation_checkpointing": True},
    "stage 3 in float32": {"zero_stage": 3, "precision": "fp32"},
}


def figures(case: str) -> Any:
    """The memory of a CPU process and plans for A100 nodes, or for nodes of the device that the case names."""
    config = llama("7B", **CASES.get(case, {}))
    rows = make_plan(config, [1, 8], cluster_of(case if case in DEVICES else "a100", mtbf_node_hours=10.0))
    memory = [process_memory(config, ranks, on_cpu=True) for ranks in (1, 64) if case in CASES]
    return json.loads(json.dumps({"plan": [row.to_json() for row in rows], "on_cpu": [asdict(m) for m in memory]}))


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    if not isinstance(value, dict | list):
        return {path: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {leaf: v for key, child in pairs for leaf, v in flat(child, f"{path}/{key}").items()}


@pytest.mark.parametrize("case", [*CASES, *DEVICES])
def test_the_figures_of_a_plan_are_the_recorded_ones(case: str) -> None:
    found, recorded = flat(figures(case)), flat(json.loads(RECORDED.read_text())[case])
    assert found.keys() == recorded.keys()
    for path, expected in recorded.items():
        assert found[path] == (pytest.approx(expected, rel=1e-9) if isinstance(expected, float) else expected), path


if __name__ == "__main__":
    print("{" + ",\n".join(f"{json.dumps(case)}: {json.dumps(figures(case))}" for case in [*CASES, *DEVICES]) + "}")
