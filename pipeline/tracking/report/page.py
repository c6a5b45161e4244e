"""The report's page: one HTML file that loads nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2


@dataclass(frozen=True)
class Section:
    """One titled box of the page; the template escapes every field but `html`."""

    title: str
    """Its title."""
    note: str = ""
    """A line below the title."""
    wide: bool = False
    """Whether it takes the whole width."""
    html: str = ""
    """A chart or a fixed text of ours, as HTML."""
    head: Sequence[str] = ()
    """The column names of its table; empty for none."""
    rows: Sequence[Sequence[str]] = ()
    """The rows of its table."""
    texts: Sequence[tuple[str, str]] = ()
    """Names and long texts; each text is folded behind its name."""
    opened: str = ""
    """The name of the text that is unfolded at first."""


def render(
    title: str, subtitle: str, plotly: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> str:
    """Returns the page: names and values of large figures, then the sections; `plotly` is its JavaScript."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(title=title, subtitle=subtitle, plotly=plotly, tiles=tiles, sections=sections)
