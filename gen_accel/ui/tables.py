"""Tables, links and players as HTML, and the data of charts."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gen_accel.files import plain

CSS = """
.ga-table { width: 100%; border-collapse: collapse; font-size: 0.92rem; }
.ga-table, .ga-table thead, .ga-table tr { border: 0 !important; }
.ga-table th { text-align: left; font-weight: 600; opacity: 0.75; }
.ga-table td, .ga-table th { padding: 0.35rem 0.8rem 0.35rem 0 !important; vertical-align: top;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  overflow-wrap: break-word; word-break: normal; }
.ga-table td:last-child { overflow-wrap: anywhere; }
.ga-table td.ga-figure { font-weight: 600; font-variant-numeric: tabular-nums; }
.ga-links a { display: inline-block; margin: 0.5rem 0.5rem 0 0; padding: 0.3rem 0.8rem;
  border: 1px solid var(--border-color-primary); border-radius: 8px; text-decoration: none;
  color: inherit; }
.ga-links a:hover { background: var(--background-fill-secondary); }
.ga-note { border-left: 4px solid var(--primary-500); padding: 0.4rem 0.8rem; margin: 0.4rem 0;
  background: color-mix(in srgb, var(--primary-500) 8%, transparent); border-radius: 6px; }
.ga-media { width: 100%; border-radius: 8px; }
video.ga-media { image-rendering: pixelated; max-height: 480px; background: #000; }
.ga-pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.82rem; line-height: 1.35;
  font-family: var(--font-mono); padding: 0.6rem; border-radius: 8px;
  background: var(--background-fill-secondary); }
.ga-hint { opacity: 0.75; font-size: 0.9rem; }
@media (max-width: 480px) { .ga-table { font-size: 0.85rem; } }
"""

FIGURE = ' class="ga-figure"'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, figure: int | None = 1) -> str:
    """Write a table.

    Args:
        head: titles of the columns; none for a table without them.
        figure: number of the column that is set off; None for none.
    """
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = []
    for row in rows:
        cells = "".join(
            f"<td{FIGURE if i == figure else ''}>{html.escape(str(cell))}</td>"
            for i, cell in enumerate(row)
        )
        body.append(f"<tr>{cells}</tr>")
    above = f"<thead><tr>{titles}</tr></thead>" if head else ""
    return f'<table class="ga-table">{above}<tbody>{"".join(body)}</tbody></table>'


def note(*sentences: str) -> str:
    """Set sentences off; none are nothing."""
    return "".join(f'<div class="ga-note">{html.escape(one)}</div>' for one in sentences if one)


def hint(text: str) -> str:
    return f'<p class="ga-hint">{html.escape(text)}</p>'


def lines(text: str) -> str:
    """Text with its lines and spaces, in a fixed font."""
    return f'<div class="ga-pre">{html.escape(text)}</div>'


def links(named: Iterable[tuple[str, str, str]]) -> str:
    """Write links that download.

    Args:
        named: words, address and file name of each.
    """
    found = [
        f'<a href="{html.escape(address)}" download="{html.escape(name)}">{html.escape(words)}</a>'
        for words, address, name in named
    ]
    return f'<div class="ga-links">{"".join(found)}</div>'


def json_link(words: str, data: Any, name: str) -> str:
    """Write a link that downloads data as JSON; the data lies in the page."""
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    held = base64.b64encode(text.encode()).decode()
    return links([(words, f"data:application/json;base64,{held}", name)])


def charted(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Make columns the data frame that a chart takes."""
    import pandas as pd

    return pd.DataFrame({**columns})


def image(address: str, alt: str) -> str:
    return f'<img class="ga-media" src="{html.escape(address)}" alt="{html.escape(alt)}">'


def video(address: str, label: str) -> str:
    return (
        '<video class="ga-media" controls loop muted playsinline preload="auto" '
        f'aria-label="{html.escape(label)}" src="{html.escape(address)}"></video>'
    )
