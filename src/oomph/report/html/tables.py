"""Tables of a page: cells are text that is escaped where it is printed; numbers align to the right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from oomph.report.lines import clean, percent
from oomph.units import size


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: what it says.
        number: whether it aligns to the right.
        bar: a share from 0 to 1 that is drawn as a bar in place of words.
        colour: of the bar, or of the text; empty for the page's own.
        code: whether it is something to type.
    """

    text: str = ""
    number: bool = False
    bar: float | None = None
    colour: str = ""
    code: bool = False


class Table(NamedTuple):
    """A table with its caption."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Node(NamedTuple):
    """A line of a tree, with the lines below it."""

    name: str
    bytes: str
    share: str
    bar: float
    children: tuple[Node, ...]


def words(text: str, colour: str = "") -> Cell:
    """A cell of words."""
    return Cell(clean(text), colour=colour)


def code(text: str) -> Cell:
    """A cell of something to type, or of a name in code."""
    return Cell(clean(text), code=True)


def number(text: str) -> Cell:
    """A cell with a number that is already written."""
    return Cell(clean(text), number=True)


def bar(share: float, colour: str = "accent") -> Cell:
    """A cell with a bar; `share` is its length, 1 the longest."""
    return Cell(bar=min(max(share, 0.0), 1.0), colour=colour)


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """A table."""
    return Table(caption, tuple(head), tuple(tuple(row) for row in rows))


def tree(parts: dict[str, int]) -> tuple[Node, ...]:
    """Bytes by dotted path as a tree, the largest first; names that have only one below them are joined with it."""
    total = sum(parts.values())
    rooted = {tuple([path] if " " in path else path.split(".")): nbytes for path, nbytes in parts.items()}
    return _nodes(rooted, total)


def _nodes(parts: dict[tuple[str, ...], int], total: int) -> tuple[Node, ...]:
    groups: dict[str, dict[tuple[str, ...], int]] = {}
    for path, nbytes in parts.items():
        groups.setdefault(path[0], {})[path[1:]] = nbytes
    ranked = sorted(groups.items(), key=lambda item: -sum(item[1].values()))
    return tuple(_node(name, below, total) for name, below in ranked)


def _node(name: str, below: dict[tuple[str, ...], int], total: int) -> Node:
    while len(firsts := {path[:1] for path in below}) == 1 and (first := firsts.pop()):
        name = f"{name}.{first[0]}"
        below = {path[1:]: nbytes for path, nbytes in below.items()}
    whole = sum(below.values())
    children: tuple[Node, ...] = ()
    if len(below) > 1:
        children = _nodes({path or ("by itself",): nbytes for path, nbytes in below.items()}, total)
    share = whole / total if total else 0.0
    return Node(clean(name), size(whole), percent(whole, total), share, children)
