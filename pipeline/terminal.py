"""The console for tables and progress, which shows text of any origin as it is; `text_format.echo` prints lines."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.text_format import printable


class Terminal(Console):
    """A console that shows every text as it is: without markup, emoji names or characters that control a terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Returns a text of a line or a table's cell as rich prints it."""
        return super().render_str(printable(text), **options)
