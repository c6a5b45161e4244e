"""Configs: what is read, and that everything wrong is reported at once, with its place and its cure."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli.reference import generated
from pipeline.config.load import dump_config, load_config, parse_config
from pipeline.config.sections import Config
from pipeline.errors import ConfigError, UsageError

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"


def tree(**changes: Any) -> dict[str, Any]:
    """The demo config with dotted changes; None removes a key."""
    result = copy.deepcopy(yaml.safe_load(DEMO.read_text()))
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        if value is None:
            node.pop(key)
        else:
            node[key] = value
    return result


def problems(world_size: int = 1, overrides: tuple[str, ...] = (), **changes: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(tree(**changes)), overrides, world_size=world_size)
    return {p.path: p.message for p in caught.value.problems}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_committed_config_is_valid(path):
    assert isinstance(load_config(path), Config)


def test_the_resolved_config_reads_back_equal():
    config = load_config(DEMO, ["optimizer.betas=[0.8, 0.9]", "deepspeed={a: {b: 1}}"])
    assert parse_config(dump_config(config)) == config


def test_schema_and_reference_are_current():
    for file, text in generated().items():
        assert (ROOT / file).read_text() == text, f"{file}: run `make schema`"


def test_overrides_are_yaml_values_at_dotted_paths():
    config = load_config(DEMO, ["optimizer.learning_rate=1e-2", "train.compile=true", "data.sources.0.weight=2.5"])
    assert config.optimizer.learning_rate == 0.01
    assert config.train.compile is True
    assert config.data.sources[0].weight == 2.5


def test_floats_without_a_dot_are_numbers():
    text = DEMO.read_text().replace("eps: 1.0e-8", "eps: 1e-8")
    assert parse_config(text).optimizer.eps == 1e-8


def test_all_problems_are_reported_at_once():
    found = problems(
        world_size=4,
        **{
            "modle": 3,
            "train.max_iters": "many",
            "train.batch_size": 12,
            "model.d_model": 102,
            "optimizer.weigth_decay": 0.1,
            "optimizer.warmup_iters": 10_000,
            "name": None,
        },
    )
    assert set(found) == {
        "modle", "train.max_iters", "train.batch_size", "model.d_model", "optimizer.weigth_decay",
        "optimizer.warmup_iters", "name",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"train.max_iters": 1.5}, "train.max_iters", ["given 1.5", "integer"]),
        ({"train.max_iters": True}, "train.max_iters", ["given true", "integer"]),
        ({"train.max_iters": "3"}, "train.max_iters", ['given "3"', "integer"]),
        ({"train.max_iters": 0}, "train.max_iters", ["given 0", "greater than or equal to 1"]),
        ({"train.precision": "fp16"}, "train.precision", ['given "fp16"', "'fp32' or 'bf16'"]),
        ({"model": 3}, "model", ["given 3", "object"]),
        ({"model.numheads": 3}, "model.numheads", ["did you mean `num_heads` in the section `model`"]),
        ({"train.learning_rate": 1.0}, "train.learning_rate", ["`learning_rate` in the section `optimizer`"]),
        ({"max_iters": 10}, "max_iters", ["`max_iters` in the section `train`"]),
        ({"model.d_model": 102}, "model.d_model", ["given 102", "multiple of num_heads = 4"]),
        ({"model.d_model": 12}, "model.num_heads", ["heads of 3", "even"]),
        ({"optimizer.warmup_iters": 5000}, "optimizer.warmup_iters", ["at most cosine_cycle_iters"]),
        ({"optimizer.min_learning_rate": 1.0}, "optimizer.min_learning_rate", ["at most learning_rate"]),
        ({"model.vocab_size": 100}, "model.vocab_size", ["at least 257"]),
        ({"model.vocab_size": 70000, "data.dtype": "uint16"}, "data.dtype", ["65536", "uint32"]),
        ({"deepspeed": {"gradient_clipping": 1.0}}, "deepspeed.gradient_clipping", ["optimizer.gradient_clip_val"]),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}}},
            "deepspeed.zero_optimization.stage",
            ["given 3", "train.zero_stage"],
        ),
        (
            {"deepspeed": {"communication_data_type": "bf16"}},
            "deepspeed.communication_data_type",
            ["gradients are averaged in float32"],
        ),
        (
            {"deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}},
            "deepspeed.zero_optimization.zero_quantized_weights",
            ["nothing is rounded"],
        ),
        ({"train.offload_optimizer": True}, "train.offload_optimizer", ["zero_stage 1, 2 or 3"]),
        ({"tokenizer.kind": "file"}, "tokenizer.path", ["is missing"]),
        (
            {"tokenizer": {"kind": "file", "path": "t.json", "special_tokens": ["<|pad|>"]}},
            "tokenizer.special_tokens",
            ["given with kind: file", "has its own"],
        ),
        ({"tokenizer.end_of_text": "a"}, "tokenizer.end_of_text", ["'a': given a character", "<|endoftext|>"]),
        (
            {"tokenizer": {"kind": "bytes", "special_tokens": ["é"]}},
            "tokenizer.end_of_text",
            ["'é': given a character", "special_tokens"],
        ),
        ({"data.slice_size_mb": 1e-7}, "data.slice_size_mb", ["0.000001"]),
        ({"model": None}, "model", ["missing"]),
        ({"name": "a/b"}, "name", ['given "a/b"']),
    ],
)
def test_a_problem_names_the_place_what_was_given_and_what_is_allowed(changes, path, words):
    message = problems(**changes)[path]
    for word in words:
        assert word in message


def test_the_global_batch_must_be_shared_evenly_by_the_processes():
    assert parse_config(yaml.safe_dump(tree(**{"train.batch_size": 16, "train.micro_batch_size": 4})), world_size=4)
    message = problems(world_size=3, **{"train.batch_size": 16, "train.micro_batch_size": 4})["train.batch_size"]
    assert "4 x 3 = 12" in message


def test_a_bad_override_is_reported_with_the_rest():
    found = problems(overrides=("train.max_iters", "train.max_iters.x=3", "optimizer.lr=1"))
    assert "dotted.key=value" in found["train.max_iters"]
    assert "not a section" in found["train.max_iters.x"]
    assert "unknown key" in found["optimizer.lr"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- 1\n- 2\n", "list"),
        ("name: [1, 2\n", "line 2"),
        ("name: a\nname: b\n", "given twice"),
        ("name: !!python/object/apply:os.system [ls]\n", "bad YAML"),
    ],
)
def test_bad_yaml_is_one_message_with_its_line(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(text)


def test_a_missing_file_and_a_binary_file_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_the_config_is_frozen():
    config = load_config(DEMO)
    with pytest.raises(Exception, match="frozen"):
        config.train.max_iters = 3
