"""The load of experts as a heat map of layers and experts, with the names of those that are dead or overloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

from oomph.report import words
from oomph.report.expert_loads import DEAD, OVERLOADED, shares
from oomph.report.html.colours import placeholder
from oomph.report.html.drawing import Chart, Sheet, chart, text
from oomph.report.html.tables import Table, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean
from oomph.run_records import ExpertLoad, RunStage

_COLUMNS = 64
"""Experts up to which each has a column; of more of them, columns stand for equally many each, from the least loaded on."""
_WRITTEN = 8
"""Experts up to which each has a cell of its own, with its load as a number."""
_NAMED = 24


class _Class(NamedTuple):
    """A range of loads, as multiples of the even share, with its colour."""

    below: float
    name: str
    colour: str
    alpha: float


_CLASSES = (
    _Class(DEAD, f"below {DEAD}×", "bad", 0.9),
    _Class(0.5, f"{DEAD} to 0.5×", "accent", 0.8),
    _Class(0.8, "0.5 to 0.8×", "accent", 0.35),
    _Class(1.25, "about even", "muted", 0.12),
    _Class(OVERLOADED, "1.25 to 2×", "second", 0.4),
    _Class(float("inf"), "2× and more", "second", 0.95),
)


def expert_chart(stage: RunStage) -> Chart | None:
    """The load of a stage's experts; None where it has none.

    Args:
        stage: of a run.
    """
    if not any(sum(layer.total) for layer in stage.experts):
        return None
    label = f"{_counted(stage.experts)} in the last steps of stage {clean(stage.name)}. {_verdict(stage.experts)}"
    few = min(len(stage.experts), 40)
    heights = 1.6 + 0.16 * few, 2.0 + 0.42 * few if _panels(stage.experts)[1:] else 1.6 + 0.2 * few
    return chart("Load of the experts", label, lambda sheet: _fill(sheet, stage.experts), _table(stage.experts), heights)


def named(stages: Sequence[RunStage]) -> Table:
    """The experts that are dead or overloaded, those furthest from the even share first."""
    found = [(stage.name, *one) for stage in stages for one in _outliers(stage.experts)]
    rows = [
        [
            cell(stage),
            number(f"{layer}"),
            number(f"{expert}"),
            cell("dead" if share < DEAD else "overloaded", "bad"),
            number(words.times(share)),
        ]
        for stage, layer, expert, share in found[:_NAMED]
    ]
    more = f"; {_NAMED} of {len(found):,}" if len(found) > _NAMED else ""
    return table(f"Experts that are dead or overloaded{more}", ("stage", "layer", "expert", "", "of the even share"), rows)


def _outliers(experts: Sequence[ExpertLoad]) -> list[tuple[int, int, float]]:
    found = [
        (layer.layer, expert, share)
        for layer in experts
        if sum(layer.total)
        for expert, share in enumerate(shares(layer.total))
        if share < DEAD or share >= OVERLOADED
    ]
    return sorted(found, key=lambda one: -one[2] if one[2] >= OVERLOADED else one[2] - DEAD - 1e6)


def _counted(experts: Sequence[ExpertLoad]) -> str:
    most = max(len(layer.text) for layer in experts)
    return f"How often each of {most} experts was chosen in {words.counted(len(experts), 'layer')}"


def _verdict(experts: Sequence[ExpertLoad]) -> str:
    found = _outliers(experts)
    dead, over = sum(one[2] < DEAD for one in found), sum(one[2] >= OVERLOADED for one in found)
    if not found:
        return f"None is dead (below {DEAD}× the even share) or overloaded ({OVERLOADED:.0f}× and more)."
    first = f"{words.counted(dead, 'expert')} dead (below {DEAD}× the even share)"
    return f"{first}, {over:,} overloaded ({OVERLOADED:.0f}× and more)."


def _panels(experts: Sequence[ExpertLoad]) -> list[tuple[str, list[Sequence[int]]]]:
    """The kinds of tokens that there are, each with the loads of all layers."""
    both = any(sum(layer.text) for layer in experts) and any(sum(layer.image) for layer in experts)
    whole: list[tuple[str, list[Sequence[int]]]] = [("all tokens", [layer.total for layer in experts])]
    if not both:
        return whole
    return [*whole, ("text tokens", [layer.text for layer in experts]), ("image tokens", [layer.image for layer in experts])]


def _fill(sheet: Sheet, experts: Sequence[ExpertLoad]) -> None:
    panels = _panels(experts)
    shape = (len(panels), 1) if sheet.narrow else (1, len(panels))
    every = sheet.figure.subplots(*shape, squeeze=False, sharex=True, sharey=True).flat
    for place, (axes, (name, loads)) in enumerate(zip(every, panels, strict=True)):
        _map(axes, [_columns(shares(tokens)) for tokens in loads])
        axes.set_title(name, fontsize=10, loc="left")
        if sheet.narrow or place == 0:
            axes.set_ylabel("layer")
        most = max(len(tokens) for tokens in loads)
        axes.set_xticks(range(0, most, -(-most // 16)) if most <= _COLUMNS else [])
        if not sheet.narrow or place == len(panels) - 1:
            axes.set_xlabel("expert" if most <= _COLUMNS else f"{most} experts, from the least loaded")
        step = -(-len(experts) // 16)
        axes.set_yticks(range(0, len(experts), step), [f"{layer.layer}" for layer in experts[::step]])
    sheet.figure.legend(handles=list(_handles()), loc="outside lower center", ncols=3 if sheet.narrow else 6, handlelength=1.0)


def _columns(line: Sequence[float]) -> Sequence[float]:
    """The loads of a layer in at most `_COLUMNS` columns."""
    if len(line) <= _COLUMNS:
        return line
    ranked = sorted(line)
    edges = [len(ranked) * column // _COLUMNS for column in range(_COLUMNS + 1)]
    return [sum(ranked[first:last]) / (last - first) for first, last in pairwise(edges)]


def _map(axes: Any, lines: Sequence[Sequence[float]]) -> None:
    """Draws cells: all of one class as one path, and where they are many, neighbours of one class as one."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    many = max(map(len, lines)) > _WRITTEN
    cells: dict[_Class, list[Any]] = {}
    for row, line in enumerate(lines):
        for _, group in groupby(enumerate(line), key=lambda cell: (0 if many else cell[0], _class_of(cell[1]))):
            (first, share), *others = group
            left, top, right, bottom = first - 0.46, row - 0.44, first + len(others) + 0.46, row + 0.44
            corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
            cells.setdefault(_class_of(share), []).append(Path(corners, closed=True))
    for kind, paths in cells.items():
        path = Path.make_compound_path(*paths)
        axes.add_patch(PathPatch(path, facecolor=placeholder(kind.colour), alpha=kind.alpha, linewidth=0))
    if max(map(len, lines)) <= _WRITTEN:
        for row, line in enumerate(lines):
            for column, share in enumerate(line):
                colour = placeholder("ground" if _class_of(share).alpha > 0.5 else "ink")
                text(axes, column, row, f"{share:.2f}", ha="center", va="center_baseline", fontsize=7.5, color=colour)
    axes.set_xlim(-0.6, max(map(len, lines)) - 0.4)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)


def _class_of(share: float) -> _Class:
    return next(kind for kind in _CLASSES if share < kind.below)


def _handles() -> Iterator[Any]:
    from matplotlib.patches import Patch

    for kind in _CLASSES:
        yield Patch(facecolor=placeholder(kind.colour), alpha=kind.alpha, label=kind.name)


def _table(experts: Sequence[ExpertLoad]) -> Table:
    """Each layer's loads as multiples of the even share: those of every expert where these are few, else the ends."""
    few = max(len(layer.text) for layer in experts) <= 8
    rows = []
    for layer in experts:
        for name, tokens in (("all", layer.total), ("text", layer.text), ("image", layer.image)):
            line = shares(tokens)
            if not sum(tokens):
                continue
            ends = [min(line), max(line)]
            rows.append(
                [number(f"{layer.layer}"), cell(name), *(number(words.times(share)) for share in (line if few else ends))]
            )
    wide = max(len(layer.text) for layer in experts)
    names = [f"expert {expert}" for expert in range(wide)] if few else ["least", "most"]
    return table("Loads as multiples of the even share", ("layer", "tokens", *names), rows)
