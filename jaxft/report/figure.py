"""Figures of a report: their style, and their SVG and PNG files.

In SVG, the ink is `currentColor` and the ground is transparent, so that a figure follows the
colours of the page.
"""

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#1d2330"
# Colours of about equal lightness that are legible on white and on black.
COLORS = ("#3b82c4", "#d9772b", "#2a9d6f", "#b558a0", "#c94f4f", "#8a7f2e", "#5f7fd8", "#7d8794")
ACCENT = COLORS[0]
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8,
    "text.parse_math": False,  # a class may be named $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxft",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
_DPI = 160


def render(width: float, height: float, draw: Callable[[Figure], None]) -> tuple[str, bytes]:
    """Draws a figure; returns it as SVG text and as PNG.

    Args:
      width, height: size in inches. On a phone, 4.2 inches fill the width of the page.
      draw: draws into the empty figure.
    """
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks; browsers have them
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=_DPI)
        figure.set_layout_engine("none")  # keeps the layout, which takes half of the time
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, metadata=metadata)
    return _inline(svg.getvalue().decode()), png.getvalue()


def _inline(svg: str) -> str:
    """Returns the SVG without its prologue and size, to be scaled in a page of several figures."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # would occur in each figure
    return svg.replace(INK, "currentColor")


def shorten(text: str, length: int) -> str:
    """Returns the text, cut to a number of characters; bytes that are not UTF-8 become visible."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= length else text[: length - 1] + "…"
