"""Text of any origin is shown, and never obeyed, by a terminal."""

from __future__ import annotations

import io
import logging

import pytest
from rich.table import Table

from pipeline.terminal import Terminal
from pipeline.text_format import PlainFormatter, echo, hidden_character, printable, wrapped

# Colours, the title of the window, the clipboard; C1's CSI; reversed writing; a line that another program would split.
HOSTILE = ["\x1b[31m", "\x1b]0;title\x07", "\x9b31m", "\x08\x08", "\x7f", "\u202e", "\u2066", "\u2028", "\ud800", "\r"]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_control_character_is_spelled(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown.isprintable() and shown.startswith("a\\") and shown.endswith("b")
    assert hidden_character(text) is not None
    shown.encode()


def test_ordinary_text_of_any_language_stays_as_it_is() -> None:
    text = "naïve Zürich 北京 नमस्ते שלום 🙂👨‍👩‍👧\n\tnext"
    assert printable(text) == text
    assert printable("a\r\nb") == "a\nb"


@pytest.mark.parametrize("text", [*HOSTILE, "[red]x[/red]", "[/red]", "[link=http://x]y[/link]", ":smile:", "[bold"])
def test_lines_cells_and_titles_of_the_console_are_plain_text(text: str) -> None:
    out = io.StringIO()
    console = Terminal(file=out, width=200)
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    console.print(text)
    console.print(table)
    shown = out.getvalue()
    assert shown.count(printable(text)) == 5
    assert all(line.isprintable() for line in shown.splitlines())


def test_lines_and_log_messages_are_spelled(capsys: pytest.CaptureFixture[str]) -> None:
    echo("a\x1b[31m")
    assert capsys.readouterr().out == "a\\x1b[31m\n"
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s: lost", ("a\x1b]0;b\x07",), None)
    assert PlainFormatter().format(record) == "a\\x1b]0;b\\x07: lost"


def test_a_message_breaks_between_words_and_keeps_its_indentation() -> None:
    path = "/a/very/long/path/without/any/space/that-is-longer-than-the-line.yaml"
    text = f"pipeline: error: {path}: 2 problems in the config\n  train.max_iters: given 0, allowed: 1 or more"
    assert wrapped(text, 40).split("\n") == [
        "pipeline: error:",
        f"  {path}:",
        "  2 problems in the config",
        "  train.max_iters: given 0, allowed: 1",
        "    or more",
    ]
    assert wrapped(text, 200) == text


def test_only_what_goes_to_a_terminals_stderr_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "one two three four five six"
    for is_terminal, shown in ((True, "one two three four\n  five six\n"), (False, f"{text}\n")):
        for stream in ("stderr", "stdout"):
            out = io.StringIO()
            monkeypatch.setattr(out, "isatty", lambda found=is_terminal: found, raising=False)
            monkeypatch.setattr(f"sys.{stream}", out)
            echo(text, out)
            assert out.getvalue() == (shown if stream == "stderr" else f"{text}\n")
