"""The load of experts in words and as a picture: how even it is, and which experts are dead or overloaded.

A load is told in shares of an even one: 1 is what each of a layer's experts would get if all were chosen equally often.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from oomph.report import words
from oomph.run_records import ExpertLoad

DEAD, OVERLOADED = 0.1, 2.0
"""An expert is named below the one share of an even load, and from the other one on."""
_SHOWN = 5
_WRITTEN = 16
"""Experts up to which a picture has their shares as numbers."""


def shares(numbers: Sequence[int]) -> tuple[float, ...]:
    """How often each expert was chosen, in shares of an even load; zeros where none was chosen at all."""
    total = sum(numbers)
    return tuple(number * len(numbers) / total if total else 0.0 for number in numbers)


def sentences(loads: Sequence[ExpertLoad], balance_loss: float | None = None) -> Iterator[str]:
    """What there is to say of the loads of some layers; nothing without any.

    Args:
        loads: of each layer with experts.
        balance_loss: 1 for an even load; None where nobody knows.
    """
    if not loads:
        return
    of_all = [share for load in loads for share in shares(load.total)]
    counts = sorted({len(load.text) for load in loads})
    experts = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    got = f"an expert got {min(of_all):.2f} to {max(of_all):.2f} of an even load"
    said = f"{words.counted(len(loads), 'layer')} of {experts}; {got}"
    yield said if balance_loss is None else f"{said}; balance loss {balance_loss:.3f}, and 1 is even"
    named = list(_named(loads))
    yield from named[:_SHOWN]
    if len(named) > _SHOWN:
        yield f"and {len(named) - _SHOWN:,} more"


def _named(loads: Sequence[ExpertLoad]) -> Iterator[str]:
    """Dead and overloaded experts, layer by layer."""
    for load in loads:
        found = shares(load.total)
        dead = [str(expert) for expert, share in enumerate(found) if share < DEAD]
        heavy = [f"{expert} ({share:.2f})" for expert, share in enumerate(found) if share >= OVERLOADED]
        for experts, what in ((dead, f"dead: less than {DEAD:g}"), (heavy, f"overloaded: {OVERLOADED:g} or more")):
            if experts:
                yield f"layer {load.layer}: expert{'s' * (len(experts) > 1)} {', '.join(experts)} {what} of an even load"


def draw_loads(figure: Any, loads: Sequence[ExpertLoad]) -> None:
    """Draws the loads of layers into a figure of matplotlib: a row for each, by text tokens and by image tokens, if any.

    Args:
        figure: empty.
        loads: at least one.
    """
    panels = [("text tokens", [load.text for load in loads]), ("image tokens", [load.image for load in loads])]
    seen = [(name, rows) for name, rows in panels if any(map(sum, rows))]
    widest = max(len(load.text) for load in loads)
    all_axes: Any = figure.subplots(1, len(seen), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(all_axes, seen, strict=True):
        cells = [[*shares(row), *[float("nan")] * (widest - len(row))] for row in rows]
        picture = axes.imshow(cells, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        axes.set_title(name)
        axes.set_xlabel("expert")
        axes.set_xticks(range(0, widest, -(-widest // 16)))
        axes.set_yticks(range(len(loads)), [str(load.layer) for load in loads])
        if widest <= _WRITTEN and len(loads) <= 2 * _WRITTEN:
            for row, shown in enumerate(cells):
                for expert, share in enumerate(shown[: len(rows[row])]):
                    color = "black" if 0.4 < share < 1.6 else "white"
                    axes.text(expert, row, f"{share:.2f}", ha="center", va="center", fontsize=7, color=color)
    all_axes[0].set_ylabel("layer")
    figure.colorbar(picture, ax=list(all_axes), label="load, in shares of an even one", extend="max")
