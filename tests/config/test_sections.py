"""Values and rules of the sections: a problem has a path, what was given and what is allowed."""

from __future__ import annotations

import inspect

import pytest
import yaml

from pipeline.config.data_sections import SourceConfig
from pipeline.config.load import parse_config
from pipeline.config.section_base import descriptions, section_of
from pipeline.config.sections import Config, tracking_uri_problem
from tests.config.support import problems, tree

WSD = {"optimizer.schedule": "wsd", "optimizer.cosine_cycle_iters": None}


def phase(from_step: int, name: str = "speeches", weight: float = 1.0) -> dict:
    return {"from_step": from_step, "weights": {name: weight}}


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"data.phases": [{"from_step": 0, "weights": {}}]}, "data.phases.0.weights", ["at least 1 entry"]),
        ({"data.phases": [phase(0, weight=0.0)]}, "data.phases.0.weights.speeches", ["more than 0"]),
        ({"train.max_iters": 1.5}, "train.max_iters", ["given 1.5", "a whole number"]),
        ({"train.max_iters": True}, "train.max_iters", ["given true", "a whole number"]),
        ({"train.max_iters": "3"}, "train.max_iters", ['given "3"', "a whole number"]),
        ({"train.max_iters": 0}, "train.max_iters", ["given 0", "1 or more"]),
        ({"train.precision": "fp16"}, "train.precision", ['given "fp16"', "allowed: fp32 or bf16"]),
        ({"data.sources.0.paths": []}, "data.sources.0.paths", ["given []", "at least 1 entry"]),
        ({"data.slice_size_mb": 1e-7}, "data.slice_size_mb", ["0.000001"]),
        ({"model": 3}, "model", ["given 3", "`key: value`"]),
        ({"model": None}, "model", ["missing"]),
        ({"name": "a/b"}, "name", ['given "a/b"', "letters, digits"]),
    ],
)
def test_a_wrong_value_is_reported_with_what_is_allowed(changes, path, words):
    message = problems(**changes)[path]
    for word in words:
        assert word in message


def test_the_only_source_of_a_list_is_reported_without_calling_the_list_too_short():
    assert set(problems(**{"data.sources": [{"name": "text", "paths": []}]})) == {"data.sources.0.paths"}
    assert set(problems(**{"data.sources": []})) == {"data.sources"}


@pytest.mark.parametrize("section", [SourceConfig, *map(section_of, Config.model_fields.values())])
def test_every_field_is_described_where_it_is_defined(section):
    told = descriptions(section or Config)
    for name, info in (section or Config).model_fields.items():
        assert told.get(name) or section_of(info), name


def test_without_the_source_a_message_only_lacks_the_description(monkeypatch):
    def no_source(_: type) -> str:
        raise OSError("source code not available")

    monkeypatch.setattr(inspect, "getsource", no_source)
    assert problems(**{"train.batch_size": None}) == {"train.batch_size": "is missing and has no default"}


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"model.d_model": 102}, "model.d_model", ["given 102", "num_heads = 4"]),
        ({"model.d_model": 12}, "model.num_heads", ["even", "not 3"]),
        ({"model.head_dim": 7, "model.d_model": 102}, "model.head_dim", ["given 7", "even"]),
        ({"model.num_kv_heads": 3}, "model.num_kv_heads", ["given 3", "num_heads = 4"]),
        (
            {"model.rope_scaling": {"kind": "llama3", "factor": 8}},
            "model.rope_scaling.original_context_length",
            ["missing"],
        ),
        (
            {"model.rope_scaling": {"kind": "linear", "factor": 8, "low_frequency_factor": 5}},
            "model.rope_scaling.high_frequency_factor",
            ["given 4.0", "low_frequency_factor = 5.0"],
        ),
        ({"optimizer.warmup_iters": 1001}, "optimizer.warmup_iters", ["cosine_cycle_iters = 1000"]),
        ({"optimizer.decay_iters": 10}, "optimizer.decay_iters", ["given 10", "schedule: wsd"]),
        ({"optimizer.schedule": "linear"}, "optimizer.cosine_cycle_iters", ["given 1000", "schedule: cosine"]),
        (WSD, "optimizer.decay_iters", ["missing", "wsd"]),
        ({**WSD, "optimizer.decay_iters": 901}, "train.max_iters", ["given 1000", "at least 1001"]),
        ({"optimizer.min_learning_rate": 1.0}, "optimizer.min_learning_rate", ["learning_rate = 0.01"]),
        ({"model.vocab_size": 256}, "model.vocab_size", ["given 256", "at least 257"]),
        (
            {"model.vocab_size": 258, "tokenizer.special_tokens": ["<|a|>", "<|b|>"]},
            "model.vocab_size",
            ["given 258", "at least 259"],
        ),
        ({"model.vocab_size": 65537, "data.dtype": "uint16"}, "data.dtype", ["65536", "uint32"]),
        ({"train.offload_optimizer": True}, "train.offload_optimizer", ["zero_stage 1"]),
        ({"train.overlap_comm": True}, "train.overlap_comm", ["zero_stage 1"]),
        ({"tokenizer.kind": "file"}, "tokenizer.path", ["missing"]),
        ({"tokenizer.path": "t.json"}, "tokenizer.path", ['"t.json"', "kind: file"]),
        (
            {"tokenizer": {"kind": "file", "path": "t.json", "special_tokens": ["<|pad|>"]}},
            "tokenizer.special_tokens",
            ["kind: file", "tokenizer.json"],
        ),
        ({"tokenizer.special_tokens": ["<|endoftext|>"]}, "tokenizer.special_tokens", ["twice"]),
        ({"tokenizer.special_tokens": ["<|a|>", "<|a|>"]}, "tokenizer.special_tokens", ["twice"]),
        ({"tokenizer.end_of_text": "a"}, "tokenizer.end_of_text", ["'a'", "<|endoftext|>"]),
        (
            {"tokenizer": {"kind": "bytes", "special_tokens": ["é"]}},
            "tokenizer.end_of_text",
            ["'é'", "special_tokens"],
        ),
        ({"data.sources.1.name": "speeches"}, "data.sources", ["same name"]),
        (
            {"data.sources.0.split": "validation", "data.sources.2.split": "validation"},
            "data.sources",
            ["split: validation"],
        ),
        ({"data.packing": "best_fit", "data.order": "random"}, "data.order", ["shuffle", "best_fit"]),
        (
            {"data.sources": None, "data.token_folder": "t", "data.mixing": "weighted"},
            "data.mixing",
            ['given "weighted"', "proportional", "data.phases: [{from_step: 0, weights: {NAME: 1.0}}]"],
        ),
        ({"data.phases": [phase(5)]}, "data.phases.0.from_step", ["given 5", "0"]),
        ({"data.phases": [phase(0), phase(9), phase(9)]}, "data.phases.2.from_step", ["given 9", "more than 9"]),
        (
            {"data.phases": [phase(0), phase(9, "last-speeches")]},
            "data.phases.1.weights.last-speeches",
            ["to train on", "speeches"],
        ),
    ],
)
def test_a_broken_rule_is_reported_at_one_field_and_names_the_other(changes, path, words):
    found = problems(**changes)
    assert set(found) == {path}
    for word in words:
        assert word in found[path]


@pytest.mark.parametrize(
    "changes",
    [
        {"model.d_model": 8},
        {"optimizer.warmup_iters": 1000},
        {"optimizer.cosine_cycle_iters": None},
        {**WSD, "optimizer.decay_iters": 900},
        {**WSD, "optimizer.schedule": "inv_sqrt", "optimizer.warmup_iters": 2000},
        {"optimizer.min_learning_rate": 1.0e-2},
        {"model.vocab_size": 257},
        {"model.vocab_size": 258, "tokenizer.special_tokens": ["<|a|>"]},
        {"model.vocab_size": 65536, "data.dtype": "uint16"},
        {"model.vocab_size": 65537, "data.dtype": "uint32"},
        {"model.vocab_size": 65537},
        {"train.offload_optimizer": True, "train.overlap_comm": True, "train.zero_stage": 1},
        {"tokenizer": {"kind": "file", "path": "t.json", "end_of_text": "a"}, "model.vocab_size": 3},
        {"data.sources.0.split": "auto", "data.sources.1.split": "auto"},
        {"data.token_folder": "t", "data.mixing": "weighted"},
        {"data.mixing": "proportional"},
        {"data.sources": None, "data.token_folder": "t", "data.mixing": "weighted", "data.phases": [phase(0)]},
    ],
)
def test_values_at_the_edge_of_a_rule_are_allowed(changes):
    assert parse_config(yaml.safe_dump(tree(**changes)))


@pytest.mark.parametrize(
    "uri",
    ["none", "sqlite:///mlflow.db", "sqlite:////tmp/a.db", "http://host", "https://host:5000", "http://[::1]:80/path"],
)
def test_the_address_of_a_store_is_accepted(uri):
    assert tracking_uri_problem(uri) is None


@pytest.mark.parametrize(
    ("uri", "word"),
    [
        ("sqlite:///", "sqlite:///FILE"),
        ("sqlite:///a.db?mode=ro", "?"),
        ("ftp://host", "'ftp://host'"),
        ("http://", "http(s)://HOST:PORT"),
        ("http://host:0", "'http://host:0'"),
        ("http://me:secret@host", "MLFLOW_TRACKING_PASSWORD"),
        ("http://host?token=secret", "MLFLOW_TRACKING_TOKEN"),
        ("http://host#secret", "MLFLOW_TRACKING_TOKEN"),
        ("http://host:secret", "port"),
        ("http://[secret", "host"),
    ],
)
def test_the_address_of_a_store_is_refused_without_repeating_a_secret(uri, word):
    message = tracking_uri_problem(uri)
    assert message is not None
    assert word in message and "secret" not in message


def test_a_name_of_a_task_is_no_option_and_holds_no_comma():
    for name in ("--output", "a,b", "a b", ""):
        assert set(problems(**{"evaluate.tasks": [name]})) == {"evaluate.tasks.0"}
