"""YAML of any origin: read as it is written, or refused in one message, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import time

import pytest

from pipeline.config.load import dump_config, load_config, parse_config
from pipeline.config.yaml_loader import read_yaml, write_yaml
from pipeline.errors import ConfigError, UsageError
from pipeline.launch.site import parse_site
from tests.config.support import DEMO, problems, tree

_BILLION_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HOSTILE = {
    "alias bomb": _BILLION_LAUGHS,
    "alias bomb of one long text": f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 9000)}]\n",
    "merge bomb": _BILLION_LAUGHS.replace("[x, x", "[{x: 1}, {y: 2}").replace(": &", ": {<<: &").replace("]\n", "]}\n"),
    "cycle": "a: &a [*a]\n",
    "cycle through a mapping": "a: &a {b: {c: *a}}\n",
    "flow nesting": "a: " + "[" * 100_000,
    "block nesting": "- " * 100_000,
    "keys nesting": "? " * 100_000,
    "tag of another type": "name: !!int x\n",
    "tag of Python": "name: !!python/object/apply:os.system [ls]\n",
    "binary": "name: !!binary aGk=\n",
    "set": "name: !!set {a, b}\n",
    "half a surrogate pair": 'name: "\\ud800"\n',
    "beyond Unicode": 'name: "\\UFFFFFFFF"\n',
    "unhashable key": "? [a, b]\n: 1\n",
    "long key": f"{'k' * 5000}: 1\n",
    "4300 digits": f"name: {'9' * 4301}\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "many values": "a: [" + "1, " * 200_000 + "]\n",
    "many unknown keys": "".join(f"key{i}: 1\n" for i in range(14_000)),
    "many wrong items": "data: {sources: [" + "1, " * 25_000 + "]}\nprepare: [" + "1, " * 2_000 + "]\n",
    "large": "x" * 2_000_000,
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("parse", [parse_config, parse_site])
def test_hostile_yaml_ends_in_one_short_message_in_bounded_time_and_memory(parse, case):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ConfigError) as caught:
        parse(HOSTILE[case])
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert len(str(caught.value)) < 30_000
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_000", 1000), ("0x1f", 31), ("-3", -3), ("1e-3", 0.001), ("1.5", 1.5), (".5", 0.5), ("on", True),
        # Read as 8, 90 and a date by YAML 1.1, and otherwise by others.
        ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"), ("~", None),
        ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)  # fmt: skip
def test_a_plain_value_is_read_as_every_reader_would_or_as_text(text, value):
    found = read_yaml(text)
    assert found == value and type(found) is type(value)
    assert read_yaml(write_yaml([found])) == [value]


def test_text_that_looks_like_a_number_comes_back_as_text():
    config = load_config(DEMO, ['data.sources.0.name="1e3"', 'sample.prompt="010"', 'runs_dir="1e-3"'])
    assert parse_config(dump_config(config)) == config


def test_an_alias_is_a_copy_that_an_override_changes_alone():
    text = "name: s\nprepare: &r {cpus_per_task: 2}\ntrain: {}\nevaluate: *r\n"
    site = parse_site(text)
    assert (site.prepare.cpus_per_task, site.evaluate.cpus_per_task) == (2, 2)
    given = read_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    given["a"]["x"] = 5
    assert given == {"a": {"x": 5}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    "override",
    ["data.sources.²=1", "data.sources.٣.weight=1", f"data.sources.{'1' * 5000}=x", f"{'a' * 5000}=1",
     ".".join("a" * 5000) + "=1", f"train.seed={2**64 + 1}", f"train.seed={'[' * 5000}", 'name="\\ud800"',
     f"name={'n' * 5000}"],
)  # fmt: skip
def test_a_hostile_override_is_one_short_problem(override):
    found = problems(overrides=(override,))
    assert len(found) == 1
    assert all(len(path) + len(message) < 1000 for path, message in found.items())


@pytest.mark.parametrize("content", [b"", b"x" * 3_000_000])
def test_a_config_file_that_is_no_plain_small_file_is_refused_without_reading_it(content, tmp_path):
    file = tmp_path / "config.yaml"
    os.mkfifo(file) if not content else file.write_bytes(content)
    with pytest.raises(UsageError, match=str(file)):
        load_config(file)
    with pytest.raises(UsageError, match="/dev/zero"):
        load_config("/dev/zero")


CONTROL = ["\n", "\r", "\t", "\x00", "\x1b", "\x7f", "\x85", "\x9b", "\u2028", "\u202e"]


@pytest.mark.parametrize("character", CONTROL)
@pytest.mark.parametrize(
    "path",
    ["name", "runs_dir", "data.path", "data.sources.0.name", "data.sources.0.paths", "tokenizer.path", "tracking.uri",
     "tracking.experiment", "tracking.artifact_location", "container.image", "container.binds", "deepspeed"],
)  # fmt: skip
def test_a_control_character_in_a_name_or_path_of_a_config_is_refused(path, character):
    hostile: object = f"a{character}#SBATCH --uid=0"
    if path in ("data.sources.0.paths", "container.binds"):
        hostile = [hostile]
    if path == "deepspeed":
        hostile = {"nested": {str(hostile): 1}}
    with pytest.raises(ConfigError) as caught:
        parse_config(json.dumps(tree(**{path: hostile})))
    assert any(found.path.startswith(path) for found in caught.value.problems)


def test_text_that_is_content_may_hold_line_breaks():
    config = load_config(DEMO, ['data.sources.0.separator="\\n\\n"', 'sample.prompt="a\\tb\\n"'])
    assert (config.data.sources[0].separator, config.sample.prompt) == ("\n\n", "a\tb\n")
