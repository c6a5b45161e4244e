"""What `--help` shows: the words that a user types, at 80 columns, for every command; and the shells' completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import pipeline
from pipeline.cli.main import app
from tests.data.helpers import command

ROOT = Path(__file__).parents[2]


def commands(group: Any, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields every command and group with the words that lead to it."""
    yield words, group
    for name, inner in getattr(group, "commands", {}).items():
        yield from commands(inner, *words, name)


EVERY = list(commands(get_command(app)))


def help_of(words: tuple[str, ...], capsys: pytest.CaptureFixture[str], option: str = "--help") -> str:
    assert command(*words, option) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [words for words, _ in EVERY], ids=" ".join)
def test_help_speaks_of_no_types_and_has_a_short_form(words, capsys, monkeypatch):
    text = help_of(words, capsys)
    assert not re.findall(r"<(?:bool|str|list|int|float)[^>]*>|\[\[|\{[A-Z\[]", text)
    assert help_of(words, capsys, "-h") == text


def test_every_argument_and_option_with_a_value_says_what_it_takes():
    unnamed = [
        (*words, param.name)
        for words, found in EVERY
        for param in found.params
        if param.metavar is None and not getattr(param, "is_flag", False)
    ]
    assert not unnamed


@pytest.mark.parametrize(
    ("words", "usage"),
    [
        (("train",), "train [OPTIONS] CONFIG [KEY=VALUE]..."),
        (("status",), "status [OPTIONS] [RUN]..."),
        (("cancel",), "cancel [OPTIONS] RUN..."),
        (("adopt",), "adopt [OPTIONS] FORMAT [NAME=]PATH..."),
        (("devcluster", "shell"), "devcluster shell [OPTIONS] [-- COMMAND...]"),
    ],
)
def test_the_usage_is_what_a_user_types(words, usage, capsys):
    line = next(line for line in help_of(words, capsys).splitlines() if "Usage:" in line)
    assert line.rstrip().endswith(f" {usage}")


def test_the_version_is_printed(capsys):
    assert command("--version") == 0
    assert capsys.readouterr().out == f"pipeline {pipeline.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("pipeline tra", "train"), ("pipeline devcluster kil", "kill-node"), ("pipeline train --take", "--take-over")],
)
def test_a_shell_completes_commands_and_options(typed, offered):
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "_PIPELINE_COMPLETE": "complete_bash", "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }  # fmt: skip
    code = "import sys; sys.argv = ['pipeline']; from pipeline.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.split() == [offered]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "x", "--count", "abc"), "given abc, allowed: a whole number"),
        (("sample", "x", "--count", "0"), "given 0, allowed: 1 or more"),
        (("plan", "x", "--restart-s", "soon"), "given soon, allowed: a number"),
        (("ui", "--port", "70000"), "given 70000, allowed: 65,535 or less"),
        (("schema", "image"), "'image' is not one of 'config', 'site'"),
    ],
)
def test_a_wrong_value_of_an_option_is_answered_in_our_words(words, said, capsys):
    assert command(*words) == 2
    text = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert said in text and not re.search(r"Input should|Value error|valid (integer|number)", text)


def test_schemas_are_printed_for_an_editor(capsys):
    for kind, file in (("config", "configs/schema.json"), ("site", "slurm/sites/schema.json")):
        assert command("schema", kind) == 0
        assert capsys.readouterr().out == (ROOT / file).read_text()
    assert command("schema") == 0
    assert capsys.readouterr().out == (ROOT / "configs/schema.json").read_text()
