"""The memory of a stage over its steps, by role: a stacked area, the owners of the worst moment, and the card's line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from oomph.records import Prediction, StagePlan, Timeline
from oomph.report import words
from oomph.report.html.colours import ROLES, of_role, placeholder
from oomph.report.html.drawing import Chart, Sheet, chart, spread, text
from oomph.report.html.tables import Table, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean
from oomph.units import GIB, MIB, size

_FAR = 2.5
"""How many peaks the card's line may be away and still be in the chart."""
_LEAST = 0.012
"""The least share of events that gets the name of a phase, on wide screens."""


class Unit(NamedTuple):
    """A unit of an axis of bytes."""

    bytes: int
    name: str


def unit_of(nbytes: int) -> Unit:
    """The unit for bytes up to some."""
    return Unit(GIB, "GiB") if nbytes >= GIB // 2 else Unit(MIB, "MiB")


def memory_chart(stage: StagePlan, gpu: str) -> Chart | None:
    """The stage's timeline; None where the plan has none.

    Args:
        stage: of a plan.
        gpu: the card's name.
    """
    timeline = stage.timeline
    if timeline is None or not _is_whole(timeline):
        return None
    title = "Memory over the steps, by role"
    return chart(title, _label(stage, gpu), lambda sheet: _fill(sheet, stage, gpu), _table(timeline), (4.6, 6.4))


def _is_whole(timeline: Timeline) -> bool:
    """Whether every point has its bytes, which may be otherwise where somebody has changed the file."""
    points = len(timeline.events)
    lengths = {points, len(timeline.allocated_bytes), *(len(line.bytes) for line in timeline.by_role)}
    places = [timeline.peak, *([] if timeline.fails is None else [timeline.fails])]
    some = bool(timeline.by_role) and timeline.total_events > 0
    return some and len(lengths) == 1 and all(0 <= place < points for place in places)


def moment(timeline: Timeline) -> int:
    """The place of the worst moment: just before the request that cannot be served, or else the peak."""
    return timeline.peak if timeline.fails is None else max(timeline.fails - 1, 0)


def _label(stage: StagePlan, gpu: str) -> str:
    timeline, prediction = stage.timeline, stage.prediction
    assert timeline is not None
    owners = sorted(((line.bytes[moment(timeline)], line.role) for line in timeline.by_role), reverse=True)
    most = ", ".join(f"{words.roles(role)} {size(nbytes)}" for nbytes, role in owners[:3] if nbytes)
    peak = f"Allocated bytes peak at {size(prediction.allocated_peak_bytes)}"
    if prediction.failing_request:
        full = f"There is no room for {size(prediction.failing_request.bytes)} beside"
        peak = f"{full} {size(prediction.failing_request.in_use_bytes)}; if there were, {peak[:1].lower()}{peak[1:]}"
    return f"{peak}, of {size(prediction.usable_bytes)} usable on {clean(gpu)}. Most of it then: {most}."


def _table(timeline: Timeline) -> Table:
    """The timeline's points in words: where each is, all bytes, and those of each role."""
    lines = _ordered(timeline)
    rows = []
    for at, event in enumerate(timeline.events):
        part = next((part for part in reversed(timeline.parts) if part.start <= event), None)
        where = f"{part.during}, {part.phase}" if part and part.phase != part.during else part.during if part else ""
        mark = " (peak)" if at == timeline.peak else " (fails)" if at == timeline.fails else ""
        numbers = [number(size(nbytes)) for nbytes in (timeline.allocated_bytes[at], *(line[at] for line in lines.values()))]
        rows.append([number(f"{event:,}"), cell(where + mark), *numbers])
    head = ["event", "when", "allocated", *map(words.roles, lines)]
    return table("Bytes after events of the allocator; between these the lines are straight", head, rows)


def _ordered(timeline: Timeline) -> dict[str, Sequence[int]]:
    """The lines of the roles, from the bottom of the stack to its top."""
    lines = {line.role: line.bytes for line in timeline.by_role}
    return {role: lines[role] for role in sorted(lines, key=lambda role: ROLES.index(role) if role in ROLES else len(ROLES))}


def _fill(sheet: Sheet, stage: StagePlan, gpu: str) -> None:
    timeline, prediction = stage.timeline, stage.prediction
    assert timeline is not None
    top, unit = _top(timeline, prediction), unit_of(max(timeline.allocated_bytes))
    grid = {"height_ratios": (3, 2)} if sheet.narrow else {"width_ratios": (3.4, 1)}
    shape = (2, 1) if sheet.narrow else (1, 2)
    axes, owners = sheet.figure.subplots(*shape, gridspec_kw=grid)
    lines = _ordered(timeline)
    heights = [[nbytes / unit.bytes for nbytes in line] for line in lines.values()]
    colours = [placeholder(of_role(role)) for role in lines]
    axes.stackplot(timeline.events, *heights, colors=colours, linewidth=0)
    axes.set_xlim(0, timeline.total_events)
    axes.set_ylim(0, top / unit.bytes)
    axes.set_ylabel(f"allocated ({unit.name})")
    axes.set_xlabel(f"requests and releases, in order: {timeline.total_events:,} in all")
    axes.set_xticks([])
    axes.grid(axis="x", visible=False)
    _parts(axes, timeline, sheet.narrow)
    _card(axes, prediction, gpu, unit, top, timeline.total_events)
    _worst(axes, timeline, prediction, unit)
    if sheet.narrow:
        _legend(owners, timeline, prediction, lines)
    else:
        _owners(owners, timeline, prediction, lines, (unit, top))


def _top(timeline: Timeline, prediction: Prediction) -> float:
    """The end of the axis of bytes: over the peak, and over the card's line unless that is far above it."""
    peak = max(timeline.allocated_bytes)
    line = prediction.usable_bytes
    return 1.16 * (max(peak, line) if line <= _FAR * peak else 1.3 * peak) or 1.0


def _parts(axes: Any, timeline: Timeline, narrow: bool) -> None:
    """Lines where parts begin, and their names above: first what is done, below it the phases."""
    ends = [*(part.start for part in timeline.parts[1:]), timeline.total_events]
    spans: list[tuple[str, int, int]] = []
    for part, end in zip(timeline.parts, ends, strict=True):
        if spans and spans[-1][0] == part.during:
            spans[-1] = (part.during, spans[-1][1], end)
        else:
            spans.append((part.during, part.start, end))
        middle, share = (part.start + end) / 2, (end - part.start) / timeline.total_events
        axes.axvline(part.start, color=placeholder("line"), linewidth=0.6)
        if not narrow and part.phase not in ("load", "evaluate") and share > _LEAST * len(part.phase) / 2:
            place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
            text(axes, middle, 1, part.phase, color=placeholder("muted"), fontsize=8.5, **place)
    for number_of, (name, start, end) in enumerate(spans):
        axes.axvline(start, color=placeholder("muted"), linewidth=0.8)
        share = (end - start) / timeline.total_events
        if share > (0.12 if narrow else 0.05):
            place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 4 if narrow else 15), "textcoords": "offset points"}
            text(axes, (start + end) / 2, 1, name, ha="center", fontsize=9.5, **place)
        if number_of % 2:
            axes.axvspan(start, end, color=placeholder("muted"), alpha=0.06, linewidth=0, zorder=0)


def _card(axes: Any, prediction: Prediction, gpu: str, unit: Unit, top: float, events: int) -> None:
    usable, bad = prediction.usable_bytes, placeholder("bad")
    said = f"usable of {clean(gpu)}: {size(usable)}"
    place = {"xytext": (4, 4), "textcoords": "offset points", "color": bad, "fontsize": 9, "fontweight": "bold"}
    place |= {"zorder": 6, "plate": True}
    if usable <= top:
        axes.axhline(usable / unit.bytes, color=bad, linestyle=(0, (5, 3)), linewidth=1.4, zorder=5)
        text(axes, 0, usable / unit.bytes, said, **place)
    else:
        place["xytext"] = (4, -12)
        text(axes, 0, top / unit.bytes, f"↑ {said}, above this chart", **place)


def _worst(axes: Any, timeline: Timeline, prediction: Prediction, unit: Unit) -> None:
    """The peak, and where the card has no room: what comes after that is drawn faintly."""
    ink, bad, event = placeholder("ink"), placeholder("bad"), timeline.events[timeline.peak]
    peak = timeline.allocated_bytes[timeline.peak]
    late = event > 0.6 * timeline.total_events
    place = {"textcoords": "offset points", "fontsize": 9, "xytext": (-7 if late else 7, 4), "ha": "right" if late else "left"}
    said = f"peak {size(peak)}" if prediction.fits else f"{size(peak)} if there were room"
    place |= {"zorder": 6, "plate": True}
    axes.plot(
        [event], [peak / unit.bytes], marker="o", markersize=5.5, color=ink, markeredgecolor=placeholder("ground"), zorder=5
    )
    text(axes, event, peak / unit.bytes, said, color=ink, fontweight="bold", **place)
    request = prediction.failing_request
    if timeline.fails is None or request is None:
        axes.axvline(event, ymax=peak / unit.bytes / axes.get_ylim()[1], color=ink, linewidth=0.8, linestyle=":")
        return
    event, before = timeline.events[timeline.fails], timeline.allocated_bytes[moment(timeline)]
    axes.axvspan(event, timeline.total_events, color=placeholder("ground"), alpha=0.45, linewidth=0, zorder=3)
    axes.plot(
        [event, event], [before / unit.bytes, timeline.allocated_bytes[timeline.fails] / unit.bytes], color=bad, linewidth=2.2
    )
    axes.plot(
        [event], [before / unit.bytes], marker="X", markersize=8, color=bad, markeredgecolor=placeholder("ground"), zorder=4
    )
    late = event > 0.5 * timeline.total_events
    place |= {"xytext": (-9 if late else 9, -3), "ha": "right" if late else "left"}
    text(axes, event, before / unit.bytes, f"no room for {size(request.bytes)}", color=bad, fontweight="bold", **place)


def _shares(timeline: Timeline, lines: dict[str, Sequence[int]]) -> dict[str, int]:
    return {role: line[moment(timeline)] for role, line in lines.items()}


def _owners(
    axes: Any, timeline: Timeline, prediction: Prediction, lines: dict[str, Sequence[int]], scale: tuple[Unit, float]
) -> None:
    """A bar of the worst moment beside the areas, with a name and bytes for each of its owners: the legend, too."""
    (unit, top), bottom, ground = scale, 0.0, placeholder("ground")
    shares, middles = _shares(timeline, lines), []
    for role, nbytes in shares.items():
        axes.bar(0, nbytes / unit.bytes, 1, bottom=bottom, color=placeholder(of_role(role)), edgecolor=ground, linewidth=0.5)
        middles.append(bottom + nbytes / unit.bytes / 2)
        bottom += nbytes / unit.bytes
    request = prediction.failing_request
    names = [f"{words.roles(role)}  {size(nbytes) if nbytes else 'none'}" for role, nbytes in shares.items()]
    colours = [placeholder(of_role(role)) for role in shares]
    if timeline.fails is not None and request:
        wanted = request.bytes / unit.bytes
        axes.bar(0, wanted, 1, bottom=bottom, facecolor="none", edgecolor=placeholder("bad"), linestyle="--", linewidth=1.2)
        names.append(f"asked for  {size(request.bytes)}")
        colours.append(placeholder("bad"))
        middles.append(bottom + wanted / 2)
    axes.axhline(
        prediction.usable_bytes / unit.bytes, xmax=0.24, color=placeholder("bad"), linestyle=(0, (5, 3)), linewidth=1.4
    )
    axes.set_ylim(0, top / unit.bytes)
    axes.set_xlim(-0.6, 3.9)
    axes.set_axis_off()
    height = top / unit.bytes
    for middle, place, name, colour in zip(
        middles, spread(middles, height / 17, height / 40, 0.98 * height), names, colours, strict=True
    ):
        axes.plot([0.52, 0.85], [middle, place], color=placeholder("line"), linewidth=0.8)
        axes.plot([0.98], [place], marker="s", markersize=6, color=colour)
        text(axes, 1.15, place, name, va="center", fontsize=9.5)
    axes.set_title("when it fails" if timeline.fails is not None else "at the peak", fontsize=10, loc="left")


def _legend(axes: Any, timeline: Timeline, prediction: Prediction, lines: dict[str, Sequence[int]]) -> None:
    """The owners of the worst moment as a list below the areas."""
    shares = sorted(_shares(timeline, lines).items(), key=lambda item: -item[1])
    entries = [(words.roles(role), nbytes, placeholder(of_role(role))) for role, nbytes in shares]
    if timeline.fails is not None and prediction.failing_request:
        entries.insert(0, ("asked for", prediction.failing_request.bytes, placeholder("bad")))
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(len(entries) + 0.2, -0.8)
    axes.set_title("when it fails" if timeline.fails is not None else "at the peak", fontsize=10, loc="left")
    most = max((nbytes for _, nbytes, _ in entries), default=0) or 1
    for row, (name, nbytes, colour) in enumerate(entries):
        axes.plot([0.02], [row], marker="s", markersize=7, color=colour)
        text(axes, 0.06, row, name, va="center", fontsize=9.5)
        axes.barh(row, 0.3 * nbytes / most, 0.55, left=0.7, color=colour)
        text(axes, 0.67, row, size(nbytes) if nbytes else "none", va="center", ha="right", fontsize=9.5)
