"""Numbers, durations, bytes and paths as text, and text of any origin as characters that a terminal only shows."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TextIO

# C0 and C1, the line and paragraph separators, the controls of writing direction, and halves of surrogate pairs.
_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029"
_DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
_HIDDEN = re.compile(f"[{_CONTROL}{_DIRECTION}\ud800-\udfff]")
_HIDDEN_BUT_LINES = re.compile(f"(?![\t\n])[{_CONTROL}{_DIRECTION}\ud800-\udfff]")


def printable(text: object) -> str:
    r"""Returns text that no terminal obeys: every character that controls one is spelled, for example `\x1b`.

    Tabs and line breaks stay. Everything that comes from documents, names, manifests, logs or configs is printed so.
    """
    return _HIDDEN_BUT_LINES.sub(lambda found: ascii(found[0])[1:-1], str(text).replace("\r\n", "\n"))


def echo(text: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints text on stdout, or on another stream, with control characters spelled.

    What goes to stderr is a message: on a terminal its lines break between words.
    """
    stream = file or sys.stdout
    print(_for_stderr(printable(text)) if stream is sys.stderr else printable(text), file=stream, end=end, flush=True)


def wrapped(text: str, width: int) -> str:
    """Returns text whose lines break between words, further indented, and never within one, however long it is."""
    return "\n".join(line if len(line) <= width else _broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip(" ")))
    more = {"subsequent_indent": f"{indent}  ", "break_long_words": False, "break_on_hyphens": False}
    return textwrap.fill(line.lstrip(" "), width, initial_indent=indent, **more)  # type: ignore[arg-type]


def _for_stderr(text: str) -> str:
    return wrapped(text, shutil.get_terminal_size().columns) if sys.stderr.isatty() else text


class PlainFormatter(logging.Formatter):
    """Formats log messages with control characters spelled."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line of a message."""
        return _for_stderr(printable(super().format(record)))


def hidden_character(text: str) -> str | None:
    r"""Returns the first character that a name or path must not hold, spelled as `\n`; None if there is none."""
    found = _HIDDEN.search(text)
    return None if found is None else ascii(found[0])[1:-1]


def short(value: float) -> str:
    """Returns a rate in a few characters, for example `12.3k`."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def figure(value: float) -> str:
    """A figure of a plan in two or three digits: 0.0048, 95, 12.3k, 4M."""
    for size, unit, divisor in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if value >= size:
            return f"{value / divisor:.3g}{unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def count(value: float) -> str:
    """Returns a number of parameters or tokens in three digits, for example `135M` or `1.24B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds, for example `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def megabytes(size: float) -> str:
    """A number of bytes in decimal megabytes: 2.4 MB."""
    return f"{size / 1e6:.1f} MB"


def gigabytes(size: float, digits: int = 1) -> str:
    """A number of bytes in decimal gigabytes: 2.4 GB."""
    return f"{size / 1e9:.{digits}f} GB"


def rounded_duration(seconds: float) -> str:
    """Returns a duration in its largest useful unit, for example `90 s`, `45 min` or `3.2 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def byte_characters() -> list[str]:
    """Returns the printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def located(path: str | Path) -> str:
    """Returns a path as given and, if it is relative, where that is: it counts from the working folder."""
    return str(path) if Path(path).is_absolute() else f"{path} (here {Path(path).absolute()})"
