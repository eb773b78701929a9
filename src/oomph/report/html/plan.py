"""A plan as the parts of a page: verdicts, charts, tables, trees. Every number goes through `units` and `report.words`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from oomph.records import Card, Choice, Plan, Prediction, Request, Rung, StagePlan
from oomph.report import words
from oomph.report.html.colours import of_role
from oomph.report.html.drawing import Chart
from oomph.report.html.ladder_chart import cut, ladder_chart
from oomph.report.html.memory_chart import memory_chart
from oomph.report.html.tables import Node, Table, bar, code, number, table, tree
from oomph.report.html.tables import words as cell
from oomph.report.ladder import way_out
from oomph.report.lines import clean, percent
from oomph.units import size


class Figure(NamedTuple):
    """A number that stands out, and what it is."""

    value: str
    what: str


class Stage(NamedTuple):
    """What the page says of a stage, in its order.

    Attributes:
        name: of the stage.
        fits: whether it does.
        verdict: whether it fits, and by how much.
        sentences: what fails, and the way out.
        figures: that stand out.
        memory: the chart of memory over the steps.
        ladder: the chart of memory against speed.
        modules: bytes by module at the worst moment.
        moment: what that moment is.
        sections: tables that are open.
        folded: tables that open.
        rungs: title and sentences of each rung that has a name.
        notes: labels with texts.
    """

    name: str
    fits: bool
    verdict: str
    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]
    memory: Chart | None
    ladder: Chart | None
    modules: tuple[Node, ...]
    moment: str
    sections: tuple[Table, ...]
    folded: tuple[Table, ...]
    rungs: tuple[tuple[str, tuple[str, ...], str], ...]
    notes: tuple[tuple[str, tuple[str, ...]], ...]


def context(plan: Plan) -> dict[str, Any]:
    """What the template of a plan's page needs."""
    cards = f"{plan.gpus} × {clean(plan.gpu)}" if plan.gpus > 1 else clean(plan.gpu)
    return {
        "kind": "plan",
        "title": f"{clean(plan.recipe)} on {cards}",
        "stages": [_stage(stage, plan.gpu) for stage in plan.stages],
        "summary": _summary(plan) if len(plan.stages) > 1 else None,
        "versions": [f"{clean(name)} {clean(version)}" for name, version in plan.versions.items()],
    }


def _summary(plan: Plan) -> Table:
    rows = []
    for stage in plan.stages:
        sizes = (*words.needed_bytes(stage.prediction), stage.prediction.usable_bytes)
        fits = stage.prediction.fits
        verdict = cell("✓ fits" if fits else "✗ does not fit", "good" if fits else "bad")
        rows.append([cell(stage.name), verdict, *(number(size(nbytes)) for nbytes in sizes)])
    return table("All stages, bytes of one GPU", ("stage", "verdict", "allocated", "reserved", "usable"), rows)


def _stage(stage: StagePlan, gpu: str) -> Stage:
    prediction = stage.prediction
    failing = [words.failure(stage, prediction.failing_request)] if prediction.failing_request else []
    out = way_out(stage)
    moment = "when it fails" if prediction.failing_request else "at the peak"
    return Stage(
        name=clean(stage.name),
        fits=prediction.fits,
        verdict=words.verdict(prediction),
        sentences=(*failing, *([out] if out else [])),
        figures=tuple(_figures(stage)),
        memory=memory_chart(stage, gpu),
        ladder=ladder_chart(stage, gpu),
        modules=tree(prediction.by_module),
        moment=moment,
        sections=tuple(found for found in _sections(stage, gpu, moment) if found.rows),
        folded=(_requests(prediction.largest_requests, moment), _settings(stage)),
        rungs=tuple(_rung(rung, stage, title) for title, rung in _told(stage)),
        notes=tuple(_notes(stage)),
    )


def _figures(stage: StagePlan) -> Iterator[Figure]:
    prediction, choice = stage.prediction, stage.choice
    allocated, reserved = words.needed_bytes(prediction)
    yield Figure(size(allocated), "allocated at the peak" if prediction.fits else "would be allocated")
    yield Figure(size(reserved), "reserved at the peak" if prediction.fits else "would be reserved")
    yield Figure(size(prediction.usable_bytes), "usable on the card")
    yield Figure(cut(choice), f"micro-batch × accumulation, effective batch {choice.effective_batch:,}")
    if stage.speed:
        room = "a step" if prediction.fits else "a step, if it fitted"
        yield Figure(words.seconds(stage.speed.step_seconds), f"{room}, estimated")


def _sections(stage: StagePlan, gpu: str, moment: str) -> Iterator[Table]:
    prediction = stage.prediction
    yield _card(prediction, gpu)
    yield _roles(prediction, moment)
    yield _phases(prediction)
    yield _suggestions(stage)
    yield _cards(stage.fit.cards if stage.fit else (), stage)
    yield _limits(stage)


def _bars(caption: str, rows: Sequence[tuple[str, int, str]], whole: int, what: str) -> Table:
    """Bytes with bars; the longest stands for the most bytes."""
    most = max((nbytes for _, nbytes, _ in rows), default=0) or 1
    lines = [
        [cell(name), bar(nbytes / most, colour), number(size(nbytes)), number(percent(nbytes, whole))]
        for name, nbytes, colour in rows
    ]
    return table(caption, (what, "", "bytes", "share"), lines)


def _card(prediction: Prediction, gpu: str) -> Table:
    usable, left = prediction.usable_bytes, words.left_bytes(prediction)
    outside = prediction.outside or {"driver and libraries": prediction.outside_bytes}
    state = "good" if prediction.fits else "bad"
    rows = [(clean(gpu), usable + prediction.outside_bytes, "muted")]
    rows += [(f"outside the allocator: {words.outside(name)}", nbytes, "muted") for name, nbytes in outside.items()]
    rows += [
        ("usable", usable, "accent"),
        ("reserved peak", prediction.reserved_peak_bytes, state),
        ("allocated peak", prediction.allocated_peak_bytes, state),
    ]
    if left:
        rows.append(("free" if left > 0 else "missing at least", abs(left), "muted"))
    room = "" if prediction.fits else "; peaks as if there were room"
    return _bars(f"Memory of one GPU, 100 % being what is usable{room}", rows, usable, "what")


def _roles(prediction: Prediction, moment: str) -> Table:
    ranked = sorted(prediction.by_role.items(), key=lambda item: -item[1])
    rows = [(words.roles(role), nbytes, of_role(role)) for role, nbytes in ranked]
    total = sum(prediction.by_role.values())
    return _bars(f"By role, {moment}: {size(total)}", rows, total, "role")


def _phases(prediction: Prediction) -> Table:
    peaks = {clean(peak.phase): peak for peak in prediction.phases}
    if prediction.evaluation:
        peaks["evaluation"] = prediction.evaluation
    most = max((peak.allocated_peak_bytes for peak in peaks.values()), default=0) or 1
    rows = [
        [
            cell(name),
            bar(peak.allocated_peak_bytes / most),
            number(size(peak.allocated_peak_bytes)),
            number(size(peak.reserved_peak_bytes)),
        ]
        for name, peak in peaks.items()
    ]
    room = "" if prediction.fits else ", as if there were room"
    return table(f"Peak of each phase{room}", ("phase", "", "allocated", "reserved"), rows)


def _requests(requests: Sequence[Request], moment: str) -> Table:
    rows = [
        [
            number(size(item.bytes)),
            cell(words.roles(item.role)),
            code(f"{words.dtype(item.dtype)} {words.shape(item.shape)}"),
            cell(words.operator(item.op)),
            code(item.module),
        ]
        for item in requests
    ]
    return table(f"Largest requests in use {moment}", ("bytes", "role", "shape", "made by", "module"), rows)


def _settings(stage: StagePlan) -> Table:
    values = {item.name: getattr(stage.choice, item.name) for item in fields(Choice)}
    rows = []
    for name in {**values, **stage.reasons}:
        shown = words.knob(name, values[name]).removeprefix(f"{words.label(name)} ") if name in values else ""
        rows.append([cell(words.label(name)), cell(shown), cell(stage.reasons.get(name, ""))])
    return table("Settings, and the reason for each", ("setting", "value", "reason"), rows)


def _suggestions(stage: StagePlan) -> Table:
    rows = [
        [
            cell(f"{item.change} ({item.basis})"),
            number(size(item.saves_bytes)),
            number(size(item.allocated_peak_bytes)),
            cell("✓ yes" if item.fits else "✗ no", "good" if item.fits else "bad"),
        ]
        for item in stage.suggestions
    ]
    return table("Other mathematics, only suggested", ("change", "saves", "allocated", "fits"), rows)


def _cards(cards: Sequence[Card], stage: StagePlan) -> Table:
    rows = [
        [
            number(f"{card.choice.gpus:,} ×"),
            cell(card.gpu),
            number(size(card.reserved_peak_bytes)),
            number(percent(card.reserved_peak_bytes, card.usable_bytes)),
            number(cut(card.choice)),
            code(" ".join(words.settings(card.choice, stage.choice)) or "the plan's own"),
        ]
        for card in cards
    ]
    head = ("GPUs", "card", "reserved", "of usable", "micro-batch × accumulation", "settings")
    return table("What it would take: the smallest card for each number of GPUs", head, rows)


def _limits(stage: StagePlan) -> Table:
    limits = stage.fit.limits if stage.fit else ()
    rows = [[cell(words.label(item.name)), number(f"{item.value:,} {item.unit}"), cell(item.beyond)] for item in limits]
    return table("The most that fits on the card", ("what", "at most", "beyond"), rows)


def _told(stage: StagePlan) -> Iterator[tuple[str, Rung]]:
    """The rungs of which there is something to say, with their titles."""
    for rung in stage.ladder:
        if rung.named and rung.choice != stage.choice:
            yield ", ".join(rung.named), rung
    if stage.unpinned:
        yield "faster, if settings of the recipe were replaced", stage.unpinned
    if stage.nearest and not stage.ladder:
        yield "nothing fits; this comes nearest", stage.nearest


def _rung(rung: Rung, stage: StagePlan, title: str) -> tuple[str, tuple[str, ...], str]:
    settings = " ".join(words.settings(rung.choice, stage.choice))
    shares = ", ".join(words.time_shares(rung))
    sentences = (
        *(f"{words.label(name)} {clean(change)}" for name, change in rung.changes.items()),
        words.verdict(rung.prediction),
        f"{words.seconds(rung.step_seconds)} a step, {words.number(rung.samples_per_second)} samples/s; of a step: {shares}",
        f"{'exact' if rung.exact else 'not exact'}: {clean(rung.exactness)}",
    )
    return clean(title), sentences, settings


def _notes(stage: StagePlan) -> Iterator[tuple[str, tuple[str, ...]]]:
    prediction = stage.prediction
    yield "batch", (words.batch(stage.choice),)
    yield "sample", (words.sample(stage),)
    yield "parameters", (words.parameters(stage),)
    if stage.made:
        yield "model", tuple(map(clean, stage.made))
    if stage.speed:
        yield "speed", tuple(words.speed(stage.speed, prediction.fits))
    yield "error bound", (words.bound(prediction),)
    if prediction.leaves_out:
        yield "not counted", tuple(map(clean, prediction.leaves_out))
    yield "trace", (clean(stage.traced),)
    if stage.search:
        found = stage.search
        yield (
            "searched",
            (
                f"{words.counted(found.considered, 'configuration')}: {found.dominated:,} beaten by another one at any size, "
                f"{found.bounded:,} ruled out by a bound, {found.replayed:,} replayed through the allocator",
            ),
        )
