"""What is wrong with the syntax of YAML, in place of PyYAML's words for it."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.reader import ReaderError

from pipeline.config.section_base import cut

_QUOTES = "put the text in quotes"
_UNKNOWN = "cannot be read; look at the indentation, the quotes and the colons of this line and of the one before it"
# What PyYAML was reading, what it says about it, and what we say instead, at the place where that began or ended.
_AT_END, _AT_BEGINNING = "problem_mark", "context_mark"
_WORDS = (
    ("", r"could not find expected ':'", "is no `key: value`: the `:` behind the key is missing", _AT_BEGINNING),
    ("", r"character '\\t'", "a tab; indent with spaces", _AT_END),
    ("", r"character (?P<it>.+) that cannot start", "text that begins with {it} needs quotes", _AT_END),
    ("quoted", r"end of stream|document separator", "a quote is opened here and never closed", _AT_BEGINNING),
    ("quoted", r"escape", "a backslash in double quotes begins an escape; use single quotes, or write two", _AT_END),
    ("flow sequence", r"expected", "`[` opens a list that no `]` closes, or a comma is missing", _AT_BEGINNING),
    ("flow mapping", r"expected", "`{{` opens a section that no `}}` closes, or a comma is missing", _AT_BEGINNING),
    ("alias|^$", r"alias|expected alphabetic", f"`*` refers to a value that `&` names elsewhere; {_QUOTES}", _AT_END),
    ("anchor", r"", f"`&` names a value so that `*` can refer to it, each name once; {_QUOTES}", _AT_END),
    ("tag|node", r"tag|expected [^t]*'[!>]'|URI", f"`!` begins the name of a type; {_QUOTES}", _AT_BEGINNING),
    ("block scalar", r"", "behind `|` or `>` only an indentation (1-9), `+` or `-` may stand", _AT_END),
    ("node", r"node content", "a value is missing here, or a bracket is closed that was not opened", _AT_END),
    ("", r"another document", "`---` begins a second document; a file holds one", _AT_END),
    ("", r"block end.* '-'", "a list begins here among keys; indent it below its own key", _AT_END),
    ("", r"block end.* '<scalar>'", f"text follows a value that has ended; {_QUOTES}", _AT_END),
    ("", r"block end.* ':'", "a key is missing before the `:`", _AT_END),
    ("", r"block end", "the indentation is that of no line above", _AT_END),
    ("", r"sequence entries", "a list begins on a line of its own, below its key", _AT_END),
    ("", r"document start|YAML d|directive", "what begins the file is no `key: value`", _AT_END),
)  # fmt: skip


class NotAllowed(yaml.MarkedYAMLError):
    """Valid YAML that is not allowed here; the problem is told in our own words."""


def syntax_problem(error: yaml.YAMLError, text: str) -> tuple[str, str]:
    """Returns where YAML cannot be read (for example `line 3, column 5`; empty if unknown) and what to do about it."""
    if isinstance(error, ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"line {line}", f"holds the control character {ascii(chr(int(error.character)))[1:-1]}"
    problem, context = str(getattr(error, "problem", None) or ""), str(getattr(error, "context", None) or "")
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, NotAllowed):
        return _place(mark), problem
    lines = text.split("\n")
    if problem.startswith("mapping values"):
        return _place(mark), f"{_misplaced_colon(lines, mark)}: {_line(lines, mark)}"
    for reading, said, words, at in _WORDS:
        found = re.search(said, problem)
        if re.search(reading, context) and found:
            mark = getattr(error, at, None) or mark
            words = words.format(**{key: value.strip("'") for key, value in found.groupdict().items()})
            break
    else:
        words = _UNKNOWN
    return _place(mark), f"{words}: {_line(lines, mark)}" if mark else words


def _misplaced_colon(lines: list[str], mark: Any) -> str:
    before = lines[mark.line][: mark.column]
    if re.search(r":\s", before):
        return "a second `: ` in one line; put the value in quotes"
    above = next((line for line in reversed(lines[: mark.line]) if line.strip()), before)
    if re.search(r":(\s|$)", above):
        return "indented further than the key above, which has a value already"
    return f"the line above is no `key: value`, with a space behind the colon ({cut(above.strip())})"


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _line(lines: list[str], mark: Any) -> str:
    return (
        cut(lines[mark.line].strip()) if mark.line < len(lines) and lines[mark.line].strip() else "the end of the file"
    )
