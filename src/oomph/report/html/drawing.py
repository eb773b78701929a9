"""Charts as SVG inside of a page: drawn by matplotlib, once for wide screens and once for narrow ones."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from oomph.report.html.colours import placeholder, with_variables
from oomph.report.html.tables import Table
from oomph.report.lines import clean

_NARROW = 4.4
"""Inches of the figure for a phone, on which text has about the size of the page's; the wide one shows about twice as much."""
_WIDE = 9.4
_ID = re.compile(r'\s(id)="([^"]*)"')
_USED = re.compile(r'(?:url\(#|href="#)([^)"]+)')
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_DIGITS = re.compile(r"(\d\.\d\d)\d+")
_SPACE = re.compile(r"\s*\n\s*")
NUMBER = "@@"
"""What stands for the drawing's number in the names that it refers to."""


class Sheet(NamedTuple):
    """What a chart is drawn on: the figure of matplotlib, and whether it is the narrow one."""

    figure: Any
    narrow: bool


class Chart(NamedTuple):
    """A chart with its alternative in text.

    Attributes:
        title: what it shows.
        label: a sentence that says the same, for those who do not see it.
        wide: the drawing for wide screens and paper, as SVG.
        narrow: that for phones.
        table: the numbers.
    """

    title: str
    label: str
    wide: str
    narrow: str
    table: Table


def chart(
    title: str,
    label: str,
    fill: Callable[[Sheet], None],
    table: Table,
    heights: tuple[float, float] = (4.0, 4.2),
) -> Chart:
    """Draws a chart.

    Args:
        title: what it shows.
        label: the chart in a sentence.
        fill: draws on a sheet.
        table: the numbers.
        heights: of the wide and of the narrow figure, in inches.
    """
    wide, narrow = (_draw(fill, width, height) for width, height in zip((_WIDE, _NARROW), heights, strict=True))
    return Chart(title, label, wide, narrow, table)


def _draw(fill: Callable[[Sheet], None], width: float, height: float) -> str:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its cache of fonts
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a letter that the font lacks; the browser has others
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        fill(Sheet(figure, width == _NARROW))
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={key: None for key in ("Creator", "Date", "Format", "Type")})
    return _embedded(out.getvalue())


def _style() -> Any:
    ink, muted, line = map(placeholder, ("ink", "muted", "line"))
    return {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "oomph",
        "font.size": 10,
        "text.color": ink,
        "axes.labelcolor": muted,
        "axes.edgecolor": line,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.formatter.use_mathtext": False,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.linewidth": 1.8,
    }


def _embedded(svg: str) -> str:
    """The drawing without what only a file needs; names that it refers to begin with `NUMBER`."""
    svg = _COMMENT.sub("", svg[svg.index("<svg") :])
    used = set(_USED.findall(svg))
    svg = _ID.sub(lambda found: f' id="{NUMBER}{found[2]}"' if found[2] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{NUMBER}", svg).replace("xlink:href", "href")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head = re.sub(r'\s(?:width|height|version|xmlns:xlink)="[^"]*"', "", svg[: svg.index(">")])
    head = f'{head} aria-hidden="true" focusable="false"'
    whole = _SPACE.sub("\n", head + svg[svg.index(">") :])
    return with_variables(_TAG.sub(lambda tag: _DIGITS.sub(r"\1", tag[0]), whole))


def text(axes: Any, x: float, y: float, words: str, **style: Any) -> Any:
    """Writes words that may be somebody else's; with ``plate=True`` on a plate of the page's colour."""
    if style.pop("plate", False):
        style["bbox"] = {"facecolor": placeholder("ground"), "edgecolor": "none", "alpha": 0.8, "pad": 1.2}
    return axes.annotate(clean(words), (x, y), annotation_clip=False, **style)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places near those that are wanted, in the same order, no two closer than `gap`, from `low` to `high` if that has room."""
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    places = [0.0] * len(wanted)
    at_least = low
    for rank, at in enumerate(order):
        places[at] = max(wanted[at], at_least)
        places[at] = min(places[at], high - gap * (len(order) - 1 - rank))
        at_least = places[at] + gap
    return places
