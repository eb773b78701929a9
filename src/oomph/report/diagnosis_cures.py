"""What a recipe adds to a diagnosis, as parts of the screen: the request in its step, what was alive, why now, what helps."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from oomph.diagnosis_records import Cure, Diagnosis
from oomph.records import FailingRequest
from oomph.report import words
from oomph.report.lines import bar, clean, columns, field, hanging, kept, paragraph, percent, rule, size_cells
from oomph.units import size

ROLES = 6


def matched(diagnosis: Diagnosis, width: int) -> list[Text]:
    """The request in the recipe's step, and why it was made then; nothing without a recipe."""
    if diagnosis.recipe is None:
        return []
    lines = [Text(), rule(f"in {clean(diagnosis.recipe)}", width), Text()]
    if diagnosis.event is not None:
        lines += paragraph(_request(diagnosis.event), width, 2, "bold")
        lines += [Text(), *_in_use(diagnosis, diagnosis.event, width)]
        lines += _alive(diagnosis.alive, width)
        lines += [Text()]
    for number, sentence in enumerate(diagnosis.why_now):
        lines += field("" if number else "why now", [clean(sentence)], width)
    return lines


def _request(event: FailingRequest) -> str:
    """The request in a sentence."""
    dimensions = kept(f"{words.dtype(event.dtype)} {words.shape(event.shape)}")
    where = f" in {clean(event.module)}" if event.module else ""
    return f"{kept(size(event.bytes))} is {dimensions}, {words.operator(event.op)}{where}, in the {clean(event.phase)} phase."


def _in_use(diagnosis: Diagnosis, event: FailingRequest, width: int) -> list[Text]:
    reported = diagnosis.message.allocated_bytes
    said = f", {kept(size(reported))} reported" if reported is not None else ""
    reserved = f"{kept(size(event.reserved_bytes))} reserved by the allocator"
    lines = field("in use then", [f"{kept(size(event.in_use_bytes))} predicted{said}"], width)
    held = diagnosis.message.reserved_bytes
    return lines + field("held then", [f"{reserved}{f', {kept(size(held))} by the message' if held else ''}"], width)


def _alive(alive: dict[str, int], width: int) -> list[Text]:
    """What else was in use, by role."""
    rows = list(alive.items())[:ROLES]
    total = sum(alive.values())
    if not rows:
        return []
    sizes, bars = size_cells(nbytes for _, nbytes in rows), (width - 40) // 2
    lines = [Text(), *paragraph("what else was alive", width, 2, "bold")]
    for role, nbytes in rows:
        cells = [(size(nbytes), -sizes, ""), (percent(nbytes, total), -5, "dim"), (bar(nbytes, rows[0][1], bars), bars, "cyan")]
        lines.append(columns([*cells, (words.roles(role), 0, "")]))
    return lines


def predicted(cures: Sequence[Cure], width: int) -> list[Text]:
    """The changes, each with what is predicted of it in one line, and why below."""
    lines: list[Text] = []
    told: set[str] = set()
    for number, cure in enumerate(cures, 1):
        own = " (your own: half the batch)" if cure.asked else ""
        lines += hanging(f"{number}. {clean(cure.change)}{own}", width, 2, "bold" if cure.fits else "")
        numbers = _numbers(cure)
        lines += hanging(numbers, width, 5, "green" if cure.fits else "red") if numbers else []
        if cure.why not in told:
            lines += hanging(clean(cure.why), width, 5, "dim")
        told.add(cure.why)
    return lines


def _numbers(cure: Cure) -> str:
    parts = [] if cure.fits is None else ["fits" if cure.fits else "does not fit"]
    if cure.allocated_peak_bytes is not None:
        parts.append(f"allocated {kept(size(cure.allocated_peak_bytes))}")
    if cure.reserved_peak_bytes is not None:
        parts.append(f"reserved {kept(size(cure.reserved_peak_bytes))}")
    if cure.samples_per_second is not None:
        parts.append(kept(f"{words.number(cure.samples_per_second)} samples/s"))
    return ", ".join(parts)
