"""Lines of a terminal screen: measured in cells, wrapped, styled, and printed with or without colour."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from oomph.units import size

NARROWEST = 70
KEEP = "\u00a0"
"""A space at which no line is broken; it is printed as a space."""

_ASCII = str.maketrans("━╸─×…", "=--x~")


def clean(text: str) -> str:
    """The text without control characters, each replaced by ``?``, so that a name cannot steer the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text.replace(KEEP, " "))


def kept(text: str) -> str:
    """The text with spaces at which no line is broken."""
    return text.replace(" ", KEEP)


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most ``width`` cells, broken at spaces, and inside a word that is longer than a line."""
    lines = [""]
    for word in text.split(" "):
        for piece in _chop(word, width):
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if cell_len(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return [line.replace(KEEP, " ") for line in lines]


def _chop(word: str, width: int) -> list[str]:
    """The word in pieces of at most ``width`` cells; a letter without a width stays with the one before it."""
    pieces = [""]
    for letter in word:
        if cell_len(pieces[-1] + letter) > width and pieces[-1]:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def shorten(path: str, width: int) -> str:
    """A text in at most ``width`` cells: of a dotted path the last names, as they say most, else the beginning."""
    if cell_len(path) <= width:
        return path
    names = [path] if " " in path else path.split(".")
    for first in range(1, len(names)):
        tail = ".".join(names[first:])
        if cell_len(tail) < width:
            return f"…{tail}"
    return cut(path if len(names) == 1 else f"…{names[-1]}", width)


def cut(text: str, width: int) -> str:
    """The text in at most ``width`` cells, without its end where it is longer."""
    if cell_len(text) <= width:
        return text
    start = _chop(text, width - 1)[0]
    return f"{start if cell_len(start) < width else ''}…"


def bar(value: int, scale: int, width: int) -> str:
    """``value`` out of ``scale`` as a bar of at most ``width`` cells, exact to half a cell."""
    halves = round(2 * width * max(value, 0) / scale) if scale > 0 else 0
    full, rest = divmod(min(halves, 2 * width), 2)
    return "━" * full + "╸" * rest


def percent(part: int, whole: int) -> str:
    """A share in at most five cells: ``7 %``, ``999 %``, ``25×``; nothing where there is no whole."""
    if whole <= 0:
        return ""
    if part < 9.995 * whole:
        return f"{100 * part / whole:.0f} %"
    return f"{part / whole:.0f}×" if part < 999.5 * whole else ">999×"


def size_cells(sizes: Iterable[int]) -> int:
    """The width of a column of sizes."""
    return max([10, *(len(size(nbytes)) for nbytes in sizes)])


def columns(cells: Sequence[tuple[str, int, str]], indent: int = 4) -> Text:
    """One line of a table.

    Args:
        cells: (text, width, style) of each; a negative width aligns to the right, and 0 takes the text as it is.
        indent: spaces before the first. Two stand between any two cells.
    """
    line = Text(" " * indent)
    for number, (text, width, style) in enumerate(cells):
        padding = " " * (abs(width) - cell_len(text))
        line.append("  " if number else "")
        line.append(padding if width < 0 else "").append(text, style).append(padding if width > 0 else "")
    line.rstrip()
    return line


def paragraph(text: str, width: int, indent: int = 2, style: str = "") -> list[Text]:
    """Running text, wrapped and indented."""
    return [Text(" " * indent + line, style) for line in wrap(text, width - indent)]


def hanging(text: str, width: int, indent: int = 4, style: str = "") -> list[Text]:
    """Running text whose lines after the first stand two cells further in."""
    return [Text(" " * (indent + 2 * (number > 0)) + line, style) for number, line in enumerate(wrap(text, width - indent - 2))]


def field(label: str, texts: Iterable[str], width: int, indent: int = 16) -> list[Text]:
    """A label, and beside it one or more texts, each on lines of its own."""
    found: list[Text] = []
    for text in texts:
        for number, line in enumerate(wrap(text, width - indent - 2)):
            head = f"  {label}" if not found else ""
            found.append(Text(head.ljust(indent), "bold").append(Text(("  " if number else "") + line, "not bold")))
    return found


def rule(label: str, width: int) -> Text:
    """A line across the screen that begins with a label."""
    label = label if cell_len(label) <= width - 8 else shorten(label, width - 8)
    return Text("── ", "dim").append(label, "bold not dim").append(" " + "─" * (width - cell_len(label) - 4))


def printed(lines: Sequence[Text], color: bool) -> str:
    """The lines as one string that ends with a line break, with escape codes if ``color``."""
    if not color:
        return "".join(f"{line.plain.rstrip()}\n" for line in lines)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", no_color=False, highlight=False, _environ={})
    for line in lines:
        console.print(line, soft_wrap=True)
    return out.getvalue()


def ascii_only(text: str) -> str:
    """The text for a terminal that knows ASCII alone: bars of ``=``, ``x`` for the multiplication sign."""
    plain = "\n".join(line.rstrip() for line in text.translate(_ASCII).split("\n"))
    return plain.encode("ascii", "replace").decode("ascii")
