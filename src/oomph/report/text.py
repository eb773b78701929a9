"""A plan as a terminal screen: designed for 80 columns without colour, colour being an echo of the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from oomph.records import Choice, Plan, Prediction, Request, StagePlan
from oomph.report import words
from oomph.report.ladder import alternatives, way_out
from oomph.report.lines import (
    NARROWEST,
    bar,
    clean,
    columns,
    cut,
    field,
    hanging,
    kept,
    paragraph,
    percent,
    printed,
    rule,
    shorten,
    size_cells,
)
from oomph.units import size

MODULES = 6
REQUESTS = 5

_PERCENT = 5
_ARITHMETIC = ("accumulation", "effective_batch", "gpus", "nodes")


def render(plan: Plan, width: int = 80, color: bool = False) -> str:
    """The plan as text.

    Args:
        plan: what to show.
        width: cells of a line; below 70 it is taken as 70. No line is longer.
        color: whether to add escape codes for colour and weight; the words are the same.
    """
    width = max(width, NARROWEST)
    shared = _shared(plan)
    lines = [*paragraph(f"{clean(plan.recipe)} on {_cards(plan)}", width, 0, "bold"), Text()]
    for stage in plan.stages:
        lines += [*_stage(stage, plan.gpu, shared, width), Text()]
    lines += [rule("all stages", width), Text()]
    if shared:
        lines += field("not counted", [clean("; ".join(shared))], width)
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    lines += [*field("traced with", [clean(versions)], width), Text(), *_summary(plan, width)]
    return printed(lines, color)


def _cards(plan: Plan) -> str:
    return f"{plan.gpus} × {clean(plan.gpu)}" if plan.gpus > 1 else clean(plan.gpu)


def _shared(plan: Plan) -> tuple[str, ...]:
    """What no stage counts."""
    first = plan.stages[0].prediction.leaves_out if plan.stages else ()
    return tuple(item for item in first if all(item in stage.prediction.leaves_out for stage in plan.stages))


def _stage(stage: StagePlan, gpu: str, shared: Sequence[str], width: int) -> list[Text]:
    prediction = stage.prediction
    request = prediction.failing_request
    lines = [rule(clean(stage.name), width), Text()]
    lines += paragraph(words.verdict(prediction), width, 2, "bold green" if prediction.fits else "bold red")
    if request:
        lines += [Text(), *paragraph(words.failure(stage, request), width)]
    others = alternatives(stage, width)
    lines += [] if prediction.fits else others
    lines += [Text(), *_configuration(stage, width)]
    lines += memory(prediction, clean(gpu), width)
    own = [item for item in prediction.leaves_out if item not in shared]
    lines += [Text(), *field("error bound", [words.bound(prediction)], width)]
    lines += field("not counted", [clean("; ".join(own))], width) if own else []
    lines += field("trace", [clean(stage.traced)], width)
    return lines + others if prediction.fits else lines


def memory(prediction: Prediction, card: str, width: int) -> list[Text]:
    """The tables of a prediction: the card's memory, by role, by module, by phase, the largest requests."""
    moment = "when it fails" if prediction.failing_request else "at the peak"
    lines = [Text(), *_card(prediction, card, width)]
    lines += [Text(), *_breakdown(f"by role, {moment}", _named(prediction.by_role), width)]
    lines += [Text(), *_breakdown(f"by module, {moment}", _top(prediction.by_module), width)]
    lines += [Text(), *_phases(prediction, width)]
    if prediction.largest_requests:
        lines += [Text(), *_requests(prediction.largest_requests[:REQUESTS], moment, width)]
    return lines


def _configuration(stage: StagePlan, width: int) -> list[Text]:
    """Every knob: those that the recipe gives in one list, the others with their reasons."""
    values = {item.name: getattr(stage.choice, item.name) for item in fields(Choice)}
    given: list[str] = []
    chosen: list[str] = []
    derived: list[str] = []
    for name in {**values, **stage.reasons}:
        reason = clean(stage.reasons.get(name, ""))
        shown = words.knob(name, values[name]) if name in values else words.label(name)
        if words.is_given(reason):
            given += [] if name in _ARITHMETIC else [kept(shown)]
        elif name != "nodes":
            target = derived if name in _ARITHMETIC or name not in values else chosen
            target.append(f"{shown}: {reason}" if reason else shown)
    lines = field("batch", [words.batch(stage.choice)], width)
    lines += field("sample", [words.sample(stage)], width)
    lines += field("parameters", [words.parameters(stage)], width)
    lines += field("model", [clean(sentence) for sentence in stage.made], width) if stage.made else []
    lines += field("speed", words.speed(stage.speed, stage.prediction.fits), width) if stage.speed else []
    lines += field("pinned", [", ".join(given)], width) if given else []
    return lines + field("chosen", chosen, width) + field("derived", derived, width)


def _card(prediction: Prediction, card: str, width: int) -> list[Text]:
    """The card's memory: what lies outside the allocator, what is usable, and what the step takes of it."""
    usable, left = prediction.usable_bytes, words.left_bytes(prediction)
    outside = prediction.outside or {"driver and libraries": prediction.outside_bytes}
    style, room = ("green", "") if prediction.fits else ("red", "; peaks as if there were room")
    rows = [_Row(usable + prediction.outside_bytes, "", card, "dim")]
    rows += [_Row(nbytes, "", f"outside: {words.outside(name)}", "dim", "-") for name, nbytes in outside.items()]
    rows += [
        _Row(usable, percent(usable, usable), "usable", "dim", "="),
        _Row(prediction.reserved_peak_bytes, percent(prediction.reserved_peak_bytes, usable), "reserved peak", style),
        _Row(prediction.allocated_peak_bytes, percent(prediction.allocated_peak_bytes, usable), "allocated peak", style),
    ]
    if left:
        rows.append(_Row(abs(left), percent(abs(left), usable), "free" if left > 0 else "missing at least", "dim"))
    return _table(f"memory of one GPU, 100 % being what is usable{room}", rows, width)


def _breakdown(title: str, parts: dict[str, int], width: int) -> list[Text]:
    """Shares of a total."""
    total = sum(parts.values())
    rows = [_Row(nbytes, percent(nbytes, total), name) for name, nbytes in parts.items()]
    return _table(f"{title}: {size(total)}", rows, width)


def _phases(prediction: Prediction, width: int) -> list[Text]:
    """The peak of each phase, and of the evaluation."""
    peaks = {clean(peak.phase): peak for peak in prediction.phases}
    if prediction.evaluation:
        peaks["evaluation"] = prediction.evaluation
    names = max(map(cell_len, peaks), default=0)
    rows = []
    for name, peak in peaks.items():
        text = f"{name}{' ' * (names - cell_len(name))}  reserved {size(peak.reserved_peak_bytes)}"
        rows.append(_Row(peak.allocated_peak_bytes, percent(peak.allocated_peak_bytes, prediction.usable_bytes), text))
    room = "" if prediction.fits else ", as if there were room"
    return _table(f"allocated peak of each phase{room}", rows, width)


def _requests(requests: Sequence[Request], moment: str, width: int) -> list[Text]:
    """Requests in one line each: size, element type, shape, operator, module."""
    rows = [(words.dtype(item.dtype), words.shape(item.shape), words.operator(item.op)) for item in requests]
    most = (8, (width - 36) // 2, (width - 40) // 2)
    widths = [min(max(map(cell_len, texts)), cells) for texts, cells in zip(zip(*rows, strict=True), most, strict=True)]
    sizes = size_cells(item.bytes for item in requests)
    rest = width - 4 - sizes - sum(widths) - 8
    lines = paragraph(f"largest requests in use {moment}", width, 2, "bold")
    for item, row in zip(requests, rows, strict=True):
        dtype, shape, op = map(cut, row, widths)
        cells = [(dtype, widths[0], "dim"), (shape, widths[1], ""), (op, widths[2], "")]
        lines.append(columns([(size(item.bytes), -sizes, ""), *cells, (shorten(clean(item.module), rest), 0, "dim")]))
    return lines


def _summary(plan: Plan, width: int) -> list[Text]:
    """One line for each stage."""
    rows = [(words.needed_bytes(stage.prediction), stage.prediction.usable_bytes) for stage in plan.stages]
    sizes = size_cells(nbytes for (allocated, reserved), usable in rows for nbytes in (allocated, reserved, usable))
    names = [shorten(clean(stage.name), width - 22 - 3 * sizes) for stage in plan.stages]
    first = max([len("stage"), *map(cell_len, names)])
    head = [(name, -sizes, "bold") for name in ("allocated", "reserved", "usable")]
    lines = [columns([("stage", first, "bold"), ("verdict", 12, "bold"), *head], 2)]
    for name, stage, (needed, usable) in zip(names, plan.stages, rows, strict=True):
        style, verdict = ("green", "fits") if stage.prediction.fits else ("red", "does not fit")
        cells = [(size(nbytes), -sizes, "") for nbytes in (*needed, usable)]
        lines.append(columns([(name, first, ""), (verdict, 12, style), *cells], 2))
    ways = [hanging(sentence, width, 2) for stage in plan.stages if (sentence := way_out(stage))]
    return [*lines, Text(), *(line for way in ways for line in way)] if ways else lines


class _Row(NamedTuple):
    """One line of a table with bars; ``sign`` stands before the bytes."""

    nbytes: int
    share: str
    name: str
    style: str = "cyan"
    sign: str = ""


def _table(title: str, rows: Sequence[_Row], width: int) -> list[Text]:
    """Bytes, share, bar and name in columns; the longest bar stands for the most bytes."""
    scale = max((row.nbytes for row in rows), default=0)
    sizes, bars = size_cells(row.nbytes for row in rows), (width - 40) // 2
    rest = width - 4 - sizes - _PERCENT - bars - 6
    lines = paragraph(title, width, 2, "bold")
    for row in rows:
        blocks = bar(row.nbytes, scale, bars)
        cells = [(row.share, -_PERCENT, "dim"), (blocks, bars, row.style), (shorten(row.name, rest), 0, "")]
        line = columns([(size(row.nbytes), -sizes, ""), *cells])
        lines.append(Text(f"  {row.sign} ").append(line[4:]) if row.sign else line)
    return lines


def _named(by_role: dict[str, int]) -> dict[str, int]:
    return {words.roles(role): nbytes for role, nbytes in sorted(by_role.items(), key=lambda item: -item[1])}


def _top(by_module: dict[str, int]) -> dict[str, int]:
    """The largest modules, and all others in one line."""
    ranked = sorted(by_module.items(), key=lambda item: -item[1])
    rest = ranked[MODULES:]
    top = {clean(name): nbytes for name, nbytes in ranked[:MODULES]}
    return {**top, f"{len(rest)} others": sum(nbytes for _, nbytes in rest)} if rest else top
