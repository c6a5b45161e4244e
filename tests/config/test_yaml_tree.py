"""YAML and overrides: what is read as what, suggestions for unknown keys, and text that is no config at all."""

from __future__ import annotations

import pytest

from pipeline.config.load import load_config, parse_config
from pipeline.errors import ConfigError, UsageError
from tests.config.support import DEMO, problems


def test_overrides_are_yaml_values_at_dotted_paths():
    config = load_config(DEMO, ["optimizer.learning_rate=1e-2", "train.compile=true", "data.sources.0.weight=2.5"])
    assert config.optimizer.learning_rate == 0.01
    assert config.train.compile is True
    assert config.data.sources[0].weight == 2.5


def test_an_override_fills_a_section_that_the_file_leaves_out():
    assert load_config(DEMO, ["guard.max_rollbacks=9"]).guard.max_rollbacks == 9


def test_a_whole_entry_of_a_list_can_be_overridden():
    config = load_config(DEMO, ["data.sources.1={name: other, paths: [a.txt]}"])
    assert [source.name for source in config.data.sources] == ["speeches", "other", "older-speeches"]


def test_floats_without_a_dot_are_numbers():
    text = DEMO.read_text().replace("eps: 1.0e-8", "eps: 1e-8")
    assert parse_config(text).optimizer.eps == 1e-8


def test_bad_overrides_are_reported_with_the_rest():
    overrides = (
        "train.max_iters", "train.seed.x=3", "optimizer.lr=1", "train.val_interval=[", "data.sources.3=x",
        "data.sources.3.weight=1", "data.sources.first.weight=1",
    )  # fmt: skip
    found = problems(overrides=overrides, name=3)
    assert set(found) == {override.partition("=")[0] for override in overrides} | {"name"}
    assert "dotted.key=value" in found["train.max_iters"]
    assert "not a section" in found["train.seed.x"]
    assert "unknown key" in found["optimizer.lr"]
    assert "YAML" in found["train.val_interval"]
    assert "0 to 2" in found["data.sources.3"]
    assert "not a section" in found["data.sources.3.weight"]


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("model.numheads", ["`num_heads`", "`model`"]),
        ("train.learning_rate", ["`learning_rate`", "`optimizer`"]),
        ("max_iters", ["`max_iters`", "`train`"]),
        ("data.sources.0.wieght", ["`weight`", "`data.sources`"]),
        ("trian", ["`train`", "top level"]),
        ("guard.xyz", ["allowed here", "max_bad_steps, on_spike, spike_window"]),
    ],
)
def test_an_unknown_key_is_reported_with_the_nearest_known_one_and_its_section(path, names):
    message = problems(**{path: 3})[path]
    assert message.startswith("unknown key;")
    for name in names:
        assert name in message


def test_a_long_value_is_cut_in_the_message():
    message = problems(**{"train.max_iters": "x" * 100})["train.max_iters"]
    assert f'given "{"x" * 56}..., ' in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("- 1\n- 2\n", "list"),
        ("name: [1, 2\n", "line 1, column 7: `.` opens a list"),
        ("name: a\nname: b\n", "given twice"),
        ("name: !!python/object/apply:os.system [ls]\n", "bad YAML"),
        ("name: \x00\n", "bad YAML"),
    ],
)
def test_bad_yaml_is_one_message_with_its_line(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(text)
    assert [problem.path for problem in caught.value.problems] == [""]


def test_a_missing_file_and_a_binary_file_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")
