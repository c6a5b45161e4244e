"""The report's page: one HTML file that asks no network for anything."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

# Whatever a sample's text or a name may hold: the page can load nothing and send nothing.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:"
)

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #24292f; background: #f5f6f7; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 16px; margin: 0 0 4px; }
.sub { color: #5b6570; margin: 0 0 18px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 16px;
        align-items: start; }
.wide { grid-column: 1 / -1; }
section { background: #fff; border: 1px solid #e3e6e8; border-radius: 8px; padding: 14px 16px; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(112px, 1fr)); gap: 12px; margin-bottom: 16px; }
.tile { background: #fff; border: 1px solid #e3e6e8; border-radius: 8px; padding: 10px 14px; }
.tile b { display: block; font-size: 20px; font-weight: 600; } .tile span { color: #5b6570; font-size: 13px; }
.note { color: #5b6570; font-size: 13px; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 4px 10px 4px 0; border-bottom: 1px solid #eceff1; vertical-align: top; }
td:first-child { white-space: nowrap; } td:last-child { overflow-wrap: anywhere; }
th { color: #5b6570; font-weight: 600; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f7; border-radius: 6px; padding: 10px;
      margin: 6px 0 0; font-size: 13px; }
summary { cursor: pointer; color: #2f6f9f; }
"""


def page(title: str, subtitle: str, script: str, parts: Iterable[str]) -> str:
    """The whole page.

    Args:
        title: Its title, plain text.
        subtitle: One line below it, plain text.
        script: Plotly's JavaScript, put into the page.
        parts: HTML of its parts, in order.
    """
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{_STYLE}</style>",
            f"<script>{script}</script></head><body><main>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="sub">{html.escape(subtitle)}</p>',
            *parts,
            "</main></body></html>",
            "",
        ]
    )


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Large figures with a name each."""
    inside = "".join(
        f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in figures
    )
    return f'<div class="tiles">{inside}</div>'


def grid(sections: Iterable[str]) -> str:
    """Sections side by side where there is room."""
    return f'<div class="grid">{"".join(sections)}</div>'


def section(title: str, inside: str, *, wide: bool = False, note: str = "") -> str:
    """A titled box; `inside` is HTML, `note` a plain line below the title."""
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<section class="{"wide" if wide else ""}"><h2>{html.escape(title)}</h2>{below}{inside}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: str, text: str, *, opened: bool = False) -> str:
    """A text of many lines behind its title."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
