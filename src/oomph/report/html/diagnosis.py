"""A diagnosis as the parts of a page: the card at that moment, what was asked for, why it failed, and what helps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from oomph.diagnosis_records import Candidate, Cure, Diagnosis, OomMessage
from oomph.report import words
from oomph.report.html.colours import of_role, placeholder
from oomph.report.html.drawing import Chart, Sheet, chart, text
from oomph.report.html.memory_chart import unit_of
from oomph.report.html.plan import Figure
from oomph.report.html.tables import Cell, Table, bar, code, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean, percent
from oomph.units import size

_NAMES = {
    "cuda": "CUDA",
    "hip": "HIP",
    "xpu": "XPU",
    "cpu": "CPU",
    "mps": "MPS",
    "nccl": "NCCL",
    "cublas": "cuBLAS",
    "cudnn": "cuDNN",
}
_SLACK = 1.02
"""How far the parts of a card may exceed it, as printed sizes are rounded; beyond that they do not belong together."""


class _Part(NamedTuple):
    """A part of the card's memory."""

    name: str
    bytes: int
    colour: str


def context(diagnosis: Diagnosis) -> dict[str, Any]:
    """What the template of a diagnosis's page needs."""
    message = diagnosis.message
    return {
        "kind": "diagnosis",
        "title": f"Why memory ran out: {clean(diagnosis.source)}",
        "verdict": _verdict(diagnosis),
        "message": clean(message.text),
        "figures": list(_figures(message)),
        "card": _card_chart(message),
        "facts": list(_facts(diagnosis)),
        "candidates": list(_candidates(diagnosis.candidates)),
        "causes": [
            (f"{cause.rank}. {clean(cause.title)}", cause.certainty, tuple(map(clean, cause.why)), _numbers(cause.numbers))
            for cause in diagnosis.causes
        ],
        "alive": _alive(diagnosis.alive),
        "why_now": list(map(clean, diagnosis.why_now)),
        "cures": _cures(diagnosis.cures),
        "notes": list(map(clean, diagnosis.notes)),
        "frames": _frames(message),
        "others": _others(diagnosis),
        "predicted": diagnosis.recipe is not None,
    }


def reporter(message: OomMessage) -> str:
    """Who reports that memory ran out: ``CUDA allocator``."""
    return " ".join(_NAMES.get(word, word) for word in message.kind.split())


def _verdict(diagnosis: Diagnosis) -> str:
    message = diagnosis.message
    asked = "found no memory" if message.requested_bytes is None else f"could not give {size(message.requested_bytes)}"
    when = f" in the {message.phase} phase" if message.phase else ""
    cause = f": {clean(diagnosis.causes[0].title)} ({diagnosis.causes[0].certainty})" if diagnosis.causes else ""
    return f"The {reporter(message)} {asked}{when}{cause}"


def _figures(message: OomMessage) -> Iterator[Figure]:
    for nbytes, what in (
        (message.requested_bytes, "asked for"),
        (message.free_bytes, "free on the card"),
        (message.allocated_bytes, "allocated: tensors hold it"),
        (message.unallocated_bytes, "held by the allocator, and by no tensor"),
        (message.capacity_bytes, "of the card in all"),
    ):
        if nbytes is not None:
            yield Figure(size(nbytes), what)


def card_parts(message: OomMessage) -> list[_Part]:
    """The card's memory in parts that add up to it; empty where the message does not give parts that do."""
    whole, held = message.capacity_bytes, message.allocated_bytes
    if not whole or held is None:
        return []
    unused = message.unallocated_bytes
    if unused is None and message.reserved_bytes is not None:
        unused = message.reserved_bytes - held
    allocator = held + max(unused or 0, 0)
    parts = [
        _Part("tensors", held, "activation"),
        _Part("unused in the allocator", max(unused or 0, 0), "third"),
        _Part("context and libraries", max((message.process_bytes or 0) - allocator, 0), "muted"),
        _Part("other processes", sum(process.bytes for process in message.others), "scores"),
        _Part("free", message.free_bytes or 0, "good"),
    ]
    rest = whole - sum(part.bytes for part in parts)
    if rest < -(_SLACK - 1) * whole:
        return []
    return [part for part in [*parts, _Part("not said", max(rest, 0), "line")] if part.bytes]


def _card_chart(message: OomMessage) -> Chart | None:
    parts = card_parts(message)
    if not parts:
        return None
    asked = message.requested_bytes
    said = ", ".join(f"{part.name} {size(part.bytes)}" for part in parts)
    label = f"The card's memory when it ran out: {said}."
    if asked is not None:
        label += f" Asked for: {size(asked)}."
    whole = message.capacity_bytes or 0
    rows = [[cell(part.name), number(size(part.bytes)), number(percent(part.bytes, whole))] for part in parts]
    rows += [[cell("asked for"), number(size(asked)), number(percent(asked, whole))]] if asked is not None else []
    numbers = table("Parts of the card, as the message gives them", ("what", "bytes", "share"), rows)
    return chart("The card when memory ran out", label, lambda sheet: _fill(sheet, message, parts), numbers, (1.9, 3.2))


def _fill(sheet: Sheet, message: OomMessage, parts: Sequence[_Part]) -> None:
    from matplotlib.patches import Patch

    whole, asked = message.capacity_bytes or 1, message.requested_bytes
    unit = unit_of(whole)
    axes, left, ground = sheet.figure.subplots(), 0.0, placeholder("ground")
    handles = []
    for part in parts:
        wide, colour = part.bytes / unit.bytes, placeholder(part.colour)
        axes.barh(0, wide, 0.7, left=left, color=colour, edgecolor=ground, linewidth=0.8)
        handles.append(Patch(facecolor=colour, label=f"{part.name} {size(part.bytes)}"))
        left += wide
    end = 1.04 * whole / unit.bytes
    if asked is not None:
        start = (whole - (message.free_bytes or 0)) / unit.bytes
        shown, bad = min(asked, whole) / unit.bytes, placeholder("bad")
        axes.barh(1, shown, 0.7, left=start, facecolor="none", edgecolor=bad, linestyle="--", linewidth=1.4)
        style = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center", "fontsize": 9.5, "color": bad}
        text(axes, start, 1, f"asked for {size(asked)}", fontweight="bold", **style)
        end = max(end, 1.04 * (start + shown))
    axes.axvline(whole / unit.bytes, color=placeholder("bad"), linestyle=(0, (5, 3)), linewidth=1.4)
    axes.set_xlim(0, end)
    axes.set_ylim(1.6, -0.6)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit.name)
    sheet.figure.legend(handles=handles, loc="outside upper left", ncols=1 if sheet.narrow else 3, handlelength=1.0)


def _facts(diagnosis: Diagnosis) -> Iterator[tuple[str, tuple[str, ...]]]:
    message = diagnosis.message
    where = [f"rank {message.rank}"] if message.rank is not None else []
    where += [f"GPU {message.gpu}"] if message.gpu is not None else []
    yield "reported by", (", ".join([reporter(message), *where, f"line {message.line:,} of the text"]),)
    if message.torch:
        yield "worded by", (f"PyTorch {clean(message.torch)}",)
    if message.requested_low is not None and message.requested_high is not None:
        ends = f"{message.requested_low:,} to {message.requested_high:,} bytes, as sizes are printed rounded"
        yield "asked for", (ends if message.requested_low < message.requested_high else f"{message.requested_low:,} bytes",)
    if message.phase:
        yield "phase", (f"{message.phase}: {clean(message.phase_why)}",)
    if message.module:
        yield "module", (clean(message.module),)
    if message.repeats > 1:
        yield "said", (f"{message.repeats:,} times with the same numbers",)
    if diagnosis.recipe is not None:
        yield "recipe", (clean(diagnosis.recipe),)
    event = diagnosis.event
    if event is not None:
        shape = f"{words.dtype(event.dtype)} {words.shape(event.shape)}"
        by = f"{words.roles(event.role)} made by {words.operator(event.op)} in {clean(event.module) or 'no module'}"
        yield "in the step", (f"{size(event.bytes)}, {shape}: {by}", f"{size(event.in_use_bytes)} in use then")


def _candidates(candidates: Sequence[Candidate]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Each candidate with how sure it is and its reasons, but for those that another one above it has given."""
    told: set[str] = set()
    for found in candidates:
        dtype = " or ".join(words.dtype(name) for name in found.dtype.split(" or ")) if found.dtype else ""
        named = f"{clean(found.what)} {words.shape(found.shape)}{f' in {dtype}' if dtype else ''}"
        reasons = [f"dimensions: {', '.join(found.symbols)}"] if len(found.shape) > 1 else []
        reasons += [*found.why, *([f"in {', '.join(found.models)}"] if found.models else [])]
        new = tuple(clean(reason) for reason in reasons if reason not in told)
        told.update(reasons)
        yield f"{found.rank}. {named}, {size(found.bytes)}", found.certainty, new


def _numbers(numbers: dict[str, int]) -> tuple[Figure, ...]:
    return tuple(Figure(size(nbytes), clean(name)) for name, nbytes in numbers.items())


def _alive(alive: dict[str, int]) -> Table:
    ranked = sorted(alive.items(), key=lambda item: -item[1])
    most, total = max(alive.values(), default=0) or 1, sum(alive.values())
    rows = [
        [cell(words.roles(role)), bar(nbytes / most, of_role(role)), number(size(nbytes)), number(percent(nbytes, total))]
        for role, nbytes in ranked
    ]
    return table(f"What was alive then, as predicted: {size(total)}", ("role", "", "bytes", "share"), rows)


def _cures(cures: Sequence[Cure]) -> Table:
    rows = []
    for place, cure in enumerate(cures, 1):
        exact = "" if cure.exact is None else "the same" if cure.exact else "changes"
        fits = {None: cell(""), True: cell("✓ fits", "good"), False: cell("✗ does not", "bad")}[cure.fits]
        rate = "" if cure.samples_per_second is None else words.number(cure.samples_per_second)
        asked = " (asked about)" if cure.asked else ""
        row = [number(f"{place}"), cell(f"{cure.change}{asked}"), cell(cure.why), cell(exact), _bytes(cure.saves_bytes)]
        rows.append([*row, _bytes(cure.allocated_peak_bytes), _bytes(cure.reserved_peak_bytes), number(rate), fits])
    head = ("", "change", "why", "result", "tensor smaller by", "allocated", "reserved", "samples/s", "")
    return _without_empty(table("The best first", head, rows))


def _bytes(nbytes: int | None) -> Cell:
    return number("" if nbytes is None else size(nbytes))


def _without_empty(found: Table) -> Table:
    """The table without columns of which no cell says anything."""
    kept = [place for place in range(len(found.head)) if any(row[place].text for row in found.rows)]
    rows = tuple(tuple(row[place] for place in kept) for row in found.rows)
    return Table(found.caption, tuple(found.head[place] for place in kept), rows)


def _frames(message: OomMessage) -> Table:
    rows = [
        [code(frame.file), number(f"{frame.line:,}" if frame.line else ""), code(frame.function), code(frame.code)]
        for frame in message.frames
    ]
    return table("The traceback, the innermost frame last", ("file", "line", "function", "code"), rows)


def _others(diagnosis: Diagnosis) -> Table:
    rows = [
        [
            number(f"{message.line:,}"),
            number("" if message.rank is None else f"{message.rank}"),
            number("" if message.gpu is None else f"{message.gpu}"),
            cell(reporter(message)),
            _bytes(message.requested_bytes),
            _bytes(message.free_bytes),
        ]
        for place, message in enumerate(diagnosis.messages)
        if place != diagnosis.explained
    ]
    return table("Also in the text", ("line", "rank", "GPU", "reported by", "asked for", "free"), rows)
