"""A self-contained page of HTML and its parts."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from recsys.report.style import STYLE
from recsys.report.svg import HEIGHT_INCHES, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, sections: Sequence[str]) -> str:
    """Join the parts to a page."""
    return _PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(sections))


def header(title: str, lead: str, numbers: Mapping[str, str]) -> str:
    """Open a page: its title, a line of HTML about it, and its most important numbers by their names."""
    boxes = "\n".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(number)}</dd></div>" for name, number in numbers.items())
    lines = ["<header>", f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{lead}</p>']
    return "\n".join([*lines, '<dl class="numbers">', boxes, "</dl>", "</header>"])


def section(title: str, body: str) -> str:
    """Put HTML under a heading."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{body}\n</section>"


def grid(figures: Sequence[str]) -> str:
    """Put figures beside one another, as many as fit."""
    return '<div class="grid">\n' + "\n".join(figures) + "\n</div>"


def figure(name: str, title: str, caption: str, draw: "Callable[[Axes], None] | str", height: float = HEIGHT_INCHES) -> str:
    """Show a plot, or a sentence where there is nothing to draw, with what to read from it."""
    shown = f'<p class="nothing">{html.escape(draw)}</p>' if isinstance(draw, str) else render(name, title, draw, height)
    caption = "" if isinstance(draw, str) else f"\n<figcaption>{html.escape(caption)}</figcaption>"
    return f'<figure id="{name}">\n<h3>{html.escape(title)}</h3>\n{shown}{caption}\n</figure>'
