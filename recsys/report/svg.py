"""Matplotlib figures as inline SVG that takes colours and fonts from the page."""

import html
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID = "#010203", "#010204", "#010205"
FIRST, SECOND, THIRD = "#010206", "#010207", "#010208"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", FIRST: "first", SECOND: "second", THIRD: "third"}
"""Placeholders for the page's colours, which differ in light and dark mode."""

_WIDTH_INCHES, HEIGHT_INCHES = 4.9, 2.9
_MOST_CHARACTERS = 22
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "recsys",
}


@contextmanager
def _private_settings() -> Iterator[None]:
    """Let matplotlib use a temporary folder for its own files, not the home folder."""
    name = "MPLCONFIGDIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name, None)
            if before is not None:
                os.environ[name] = before


@dataclass(frozen=True)
class Plot:
    """A figure that is not drawn yet: the function that fills its axes, and its height."""

    draw: Callable[["Axes"], None]
    height_inches: float

    def svg(self, name: str, title: str) -> str:
        """Draw the figure as an SVG element; `name` makes its ids unique on the page."""
        with _private_settings():
            import matplotlib as mpl
            from matplotlib.figure import Figure

            output = io.StringIO()
            with warnings.catch_warnings(), mpl.rc_context():
                warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser draws the text and has the fonts
                mpl.rcdefaults()
                mpl.rcParams.update(_STYLE)
                figure = Figure(figsize=(_WIDTH_INCHES, self.height_inches), layout="constrained")
                self.draw(figure.add_subplot())
                figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
        return _for_page(output.getvalue(), name, title)


def plot(draw: Callable[..., None], data: Any, *more: Any, height_inches: float = HEIGHT_INCHES) -> Plot | None:
    """Return the plot that `draw(axes, data, *more)` makes; None if `data` is empty."""
    return Plot(lambda axes: draw(axes, data, *more), height_inches) if data else None


def readable(text: str) -> str:
    """Make a name from data fit for a label: no control characters, no line breaks, shortened if long."""
    plain = " ".join("".join(letter if letter.isprintable() or letter.isspace() else "\ufffd" for letter in text).split())
    return plain if len(plain) <= _MOST_CHARACTERS else plain[: _MOST_CHARACTERS - 1] + "\u2026"


def _for_page(text: str, name: str, title: str) -> str:
    svg = text[text.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    opening = re.sub(r' (width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", svg[: svg.index(">")])
    label = html.escape(title)
    return f'{opening} role="img" aria-label="{label}"><title>{label}</title>{svg[svg.index(">") + 1 :]}'
