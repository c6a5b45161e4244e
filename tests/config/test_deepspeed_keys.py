"""The section `deepspeed` holds what keeps the promises of a run; everything else is refused by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.config.deepspeed_keys import ALLOWED, refused_settings

ZERO = "zero_optimization"
# A value of each that differs from DeepSpeed's default.
EXAMPLES: dict[str, Any] = {
    "communication_data_type": "fp32",
    "reduce_bucket_size": 3000,
    "allgather_bucket_size": 3000,
    "parameter_alignment": True,
    "sub_group_size": 3000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "zero_hpz_partition_size": 2,
}


def tree(path: str, value: Any) -> dict[str, Any]:
    section, _, key = path.rpartition(".")
    return {section: {key: value}} if section else {key: value}


def refusals(given: dict[str, Any]) -> dict[str, str]:
    return {found.path: found.message for found in refused_settings(given)}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gradient_clipping", 1.0, ["given 1.0", "optimizer.gradient_clip_val"]),
        ("managed_gradient_accumulation", False, ["given false", "clipped"]),
        ("gradient_allreduce_op", "sum", ["averaged"]),
        ("bfloat16", {"enabled": True}, ["train.precision"]),
        ("tensor_parallel", {"autotp_size": 2}, ["data-parallel"]),
        ("tensorboard", {"enabled": True}, ["`tracking`"]),
        ("flops_profiler", {"enabled": True}, ["metrics.jsonl"]),
        (f"{ZERO}.stage", 3, ["given 3", "train.zero_stage"]),
        (f"{ZERO}.zenflow", {}, ["checkpoint"]),
        (f"{ZERO}.cpu_offload_param", True, ["stay on the device"]),
        (f"{ZERO}.zero_quantized_weights", True, ["given true", "rounded"]),
        (f"{ZERO}.prefetch_bucket_size", 5, ["`stage3_prefetch_bucket_size`"]),
        (f"{ZERO}.reduce_bucket_sise", 5, ["`reduce_bucket_size`"]),
        (f"{ZERO}.made_up", 5, ["allgather_bucket_size", "zero_hpz_partition_size"]),
        ("made_up", 5, ["communication_data_type"]),
    ],
)
def test_what_is_not_allowed_is_refused_with_the_reason_or_the_cure(path: str, value: Any, words: list[str]) -> None:
    found = refusals(tree(path, value))
    assert list(found) == [path]
    assert all(word in found[path] for word in words), found[path]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("communication_data_type", "bf16"),
        (ZERO, 3),
        (ZERO, True),
        (f"{ZERO}.reduce_bucket_size", 0),
        (f"{ZERO}.reduce_bucket_size", "auto"),
        (f"{ZERO}.reduce_bucket_size", 1e6),
        (f"{ZERO}.sub_group_size", True),
        (f"{ZERO}.stage3_max_live_parameters", -1),
        (f"{ZERO}.parameter_alignment", 1),
        (f"{ZERO}.zero_hpz_partition_size", 0),
    ],
)
def test_a_wrong_value_of_an_allowed_setting_is_refused(path: str, value: Any) -> None:
    assert list(refusals(tree(path, value))) == [path]


def test_all_of_them_are_reported_at_once() -> None:
    given = {"fp16": {}, "amp": {}, ZERO: {"stage": 1, "reduce_bucket_size": 0, "allgather_bucket_size": 5}}
    assert set(refusals(given)) == {"fp16", "amp", f"{ZERO}.stage", f"{ZERO}.reduce_bucket_size"}


def test_every_allowed_setting_passes() -> None:
    given = {ZERO: {key: value for key, value in EXAMPLES.items() if f"{ZERO}.{key}" in ALLOWED}}
    given |= {key: value for key, value in EXAMPLES.items() if key in ALLOWED}
    assert len(given[ZERO]) + len(given) - 1 == len(ALLOWED) == len(EXAMPLES)
    assert refusals(given) == {}


def test_the_documentation_has_a_row_for_every_allowed_setting() -> None:
    rows = [line for line in Path("docs/training.md").read_text().splitlines() if line.startswith("| `")]
    for path in ALLOWED:
        assert sum(f"`{path.rpartition('.')[2]}`" in row.split("|")[1] for row in rows) == 1, path


# ---- against the installed DeepSpeed -----------------------------------------------------------


class Asked(dict[str, Any]):
    """A config that records every key that DeepSpeed asks for, also in copies of it."""

    keys_asked: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        keys_asked = self.keys_asked

        class Keys(list[str]):
            def __contains__(self, key: object) -> bool:
                keys_asked.add(str(key))
                return super().__contains__(key)

        return Keys(super().keys())


@pytest.fixture
def known_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Every setting of DeepSpeed's own code, by dotted path, aliases and removed ones included."""
    monkeypatch.setitem(os.environ, "DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    Asked.keys_asked.clear()
    DeepSpeedConfig(Asked(train_batch_size=1))
    names = set(DeepSpeedZeroConfig.model_fields)
    names |= {field.alias for field in DeepSpeedZeroConfig.model_fields.values() if field.alias}
    yield Asked.keys_asked | {f"{ZERO}.{name}" for name in names}


def test_every_setting_that_deepspeed_knows_is_allowed_by_name_or_refused(known_to_deepspeed: set[str]) -> None:
    """A newer DeepSpeed opens no hole, and one that renames an allowed setting is noticed."""
    assert len(known_to_deepspeed) > 90, "the recording works"
    assert set(ALLOWED) <= known_to_deepspeed
    passing = {
        path for path in known_to_deepspeed - {ZERO} if not refusals(tree(path, EXAMPLES.get(path.split(".")[-1], {})))
    }
    assert passing == set(ALLOWED)


def test_every_allowed_setting_reaches_deepspeed(known_to_deepspeed: set[str]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    def parsed(given: dict[str, Any]) -> dict[str, Any]:
        config = DeepSpeedConfig({"train_batch_size": 1, **given})
        return {**config.zero_config.model_dump(), "communication_data_type": config.communication_data_type}

    default = parsed({ZERO: {"stage": 3}})
    for path in ALLOWED:
        section, _, key = path.rpartition(".")
        given = {
            ZERO: {"stage": 3, **({key: EXAMPLES[key]} if section else {})},
            **({} if section else {key: EXAMPLES[key]}),
        }
        changed = {name for name, value in parsed(given).items() if value != default[name]}
        assert changed == {key.removeprefix("stage3_")}
