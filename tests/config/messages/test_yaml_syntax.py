"""YAML that cannot be read is answered with its line and what to change; the words of PyYAML never reach a user."""

from __future__ import annotations

import re

import pytest

from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from tests.config.support import problems

CASES = {
    "a colon in a value": ("name: a\ntrain:\n  note: see: this\n", "line 3, column 12: a second `: ` in one line"),
    "further indented": ("train:\n  x: 1\n    y: 2\n", "line 3, column 6: indented further than the key above"),
    "less indented": ("train:\n    x: 1\n  y: 2\n", "line 3, column 3: the indentation is that of no line above"),
    "a tab": ("train:\n\tx: 1\n", "line 2, column 1: a tab; indent with spaces"),
    "no closing bracket": ("betas: [0.9, 0.95\nname: x\n", "line 1, column 8: `[` opens a list"),
    "no closing bracket at the end": ("betas: [0.9, 0.95\n", "line 1, column 8: `[` opens a list"),
    "no closing brace": ("betas: {a: 1\nname: x\n", "line 1, column 8: `{` opens a section"),
    "no closing quote": ('name: "abc\nx: 1\n', "line 1, column 7: a quote is opened here"),
    "no closing single quote": ("name: 'abc\nx: 1\n", "line 1, column 7: a quote is opened here"),
    "a quote over documents": ('name: "abc\n---\nx"\n', "line 1, column 7: a quote is opened here"),
    "an at sign": ("name: @abc\n", "text that begins with @ needs quotes"),
    "a backtick": ("name: `abc`\n", "text that begins with ` needs quotes"),
    "a percent sign": ("name: %abc\n", "text that begins with % needs quotes"),
    "a glob": ("paths: [*.txt]\n", "`*` refers to a value"),
    "a name with a star": ("name: *abc\n", "`*` refers to a value"),
    "a glob of folders": ("path: **/a.txt\n", "`*` refers to a value"),
    "an ampersand": ("name: &\n", "`&` names a value"),
    "the same anchor twice": ("a: &x 1\nb: &x 2\n", "`&` names a value"),
    "a Windows path": ('name: "C:\\data"\n', "a backslash in double quotes"),
    "bad hexadecimal": ('name: "\\xZZ"\n', "a backslash in double quotes"),
    "a key without a colon": ("name: a\ntrain\n  x: 1\n", "line 2, column 1: is no `key: value`"),
    "a first key without a colon": ("name a\ntrain: 1\n", "the line above is no `key: value`"),
    "no space behind the colon": ("name:a\ntrain: 1\n", "with a space behind the colon (name:a)"),
    "a list behind a key": ("train: - a\n", "a list begins on a line of its own"),
    "a list among keys": ("name: a\n- b\n", "a list begins here among keys"),
    "two documents": ("name: a\n---\nname: b\n", "`---` begins a second document"),
    "a tag": ("name: !foo bar\n", "'!foo' is not allowed"),
    "a tag of a handle": ("a: !e!x 1\n", "`!` begins the name of a type"),
    "a tag that does not end": ("a: !<x\n", "`!` begins the name of a type"),
    "a tag with a bad escape": ("a: !<%zz> x\n", "`!` begins the name of a type"),
    "a control character": ("name: \x00\n", "line 1: holds the control character \\x00"),
    "a bad block": ("name: |x\n", "behind `|` or `>`"),
    "a bad indentation of a block": ("name: >0\n", "behind `|` or `>`"),
    "two commas": ("a: [1,,2]\n", "a value is missing here"),
    "a closing brace": ("a: }\n", "a bracket is closed that was not opened"),
    "text behind quotes": ("a: 'x' y\n", "text follows a value that has ended"),
    "no key": (": a\n", "a key is missing before the `:`"),
    "TOML": ("[train]\nmax_iters = 3\n", "what begins the file is no `key: value`"),
    "a directive": ("%YAML 3.0\n---\na: 1\n", "what begins the file is no `key: value`"),
    "beyond Unicode": ('name: "\\UFFFFFFFF"\n', "an escape names no character"),
    "a program": ("import os\nx = 3\n", "holds text, allowed: sections"),
}  # fmt: skip
PYYAML = re.compile(
    r"mapping values|not allowed here|could not find|cannot start any token|but (found|got)|<block|<stream|<scalar|"
    r"end of stream|special characters|while (scanning|parsing)|undefined alias|simple key|node content|C int"
)


@pytest.mark.parametrize("case", CASES)
def test_each_mistake_is_named_with_its_place_and_what_to_change(case):
    text, said = CASES[case]
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    (problem,) = caught.value.problems
    assert said in problem.message
    assert not PYYAML.search(problem.message.replace("'!foo' is not allowed here", ""))


def test_an_override_is_answered_in_the_same_words():
    assert problems(overrides=("data.sources.0.paths=[*.txt]",))["data.sources.0.paths"] == (
        "the value '[*.txt]' is not valid YAML: `*` refers to a value that `&` names elsewhere; put the text in "
        "quotes: [*.txt]"
    )
