"""The ladder as a chart of memory against speed: which configurations fit, which are exact, and where the card ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from oomph.records import Choice, Rung, StagePlan
from oomph.report import words
from oomph.report.html.colours import placeholder
from oomph.report.html.drawing import Chart, Sheet, chart, spread, text
from oomph.report.html.memory_chart import Unit, unit_of
from oomph.report.html.tables import Table, code, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean, percent
from oomph.units import size


class _Point(NamedTuple):
    """A configuration on the chart; `names` are what is written beside it."""

    speed: float
    reserved: int
    exact: bool
    names: tuple[str, ...]


def ladder_chart(stage: StagePlan, gpu: str) -> Chart | None:
    """The stage's ladder; None where it has none.

    Args:
        stage: of a plan.
        gpu: the card's name.
    """
    if not stage.ladder:
        return None
    title = "The ladder: memory against speed"
    return chart(title, _label(stage, gpu), lambda sheet: _fill(sheet, stage, gpu), ladder_table(stage), (4.4, 4.6))


def ladder_table(stage: StagePlan) -> Table:
    """Every rung: how fast it is, what it reserves, how it cuts the batch, what it takes to get it."""
    head = ("samples/s", "step", "reserved", "of usable", "micro-batch × accumulation", "named", "exact", "settings")
    return table("Configurations that fit, the fastest first", head, (_row(rung, stage) for rung in stage.ladder))


def _row(rung: Rung, stage: StagePlan) -> list[Any]:
    reserved = words.needed_bytes(rung.prediction)[1]
    named = ", ".join([*rung.named, *(["this plan"] if rung.choice == stage.choice else [])])
    return [
        number(words.number(rung.samples_per_second)),
        number(words.seconds(rung.step_seconds)),
        number(size(reserved)),
        number(percent(reserved, rung.prediction.usable_bytes)),
        number(cut(rung.choice)),
        cell(named),
        cell("yes" if rung.exact else f"no: {rung.exactness}"),
        code(" ".join(words.settings(rung.choice, stage.choice)) or "the plan's own"),
    ]


def cut(choice: Choice) -> str:
    """The micro-batch and how many of them make a step: ``4 × 2``."""
    return f"{choice.micro_batch:,} × {choice.accumulation:,}"


def _label(stage: StagePlan, gpu: str) -> str:
    fastest, least = stage.ladder[0], min(stage.ladder, key=lambda rung: words.needed_bytes(rung.prediction)[1])
    return (
        f"{words.counted(len(stage.ladder), 'configuration')} that fit on {clean(gpu)} at effective batch "
        f"{stage.choice.effective_batch}. The fastest takes {words.number(fastest.samples_per_second)} samples a second and "
        f"reserves {size(words.needed_bytes(fastest.prediction)[1])}; the smallest reserves "
        f"{size(words.needed_bytes(least.prediction)[1])} at {words.number(least.samples_per_second)} samples a second."
    )


def _points(stage: StagePlan) -> list[_Point]:
    points = [
        _Point(
            rung.samples_per_second,
            words.needed_bytes(rung.prediction)[1],
            rung.exact,
            (*rung.named, *(["this plan"] if rung.choice == stage.choice and not rung.named else [])),
        )
        for rung in stage.ladder
    ]
    if stage.unpinned:
        rung = stage.unpinned
        points.append(_Point(rung.samples_per_second, words.needed_bytes(rung.prediction)[1], rung.exact, ("unpinned",)))
    return points


def _fill(sheet: Sheet, stage: StagePlan, gpu: str) -> None:
    axes = sheet.figure.subplots()
    points, usable = _points(stage), stage.prediction.usable_bytes
    asked = _asked(stage)
    unit = unit_of(usable)
    bad = placeholder("bad")
    most = max([usable, *(point.reserved for point in points), *([asked.reserved] if asked else [])])
    fastest = max([*(point.speed for point in points), *([asked.speed] if asked else [])])
    axes.set_ylim(0, 1.1 * most / unit.bytes)
    axes.set_xlim(0, fastest * (1.28 if sheet.narrow else 1.16))
    axes.axhspan(usable / unit.bytes, 1.1 * most / unit.bytes, color=bad, alpha=0.07, linewidth=0)
    axes.axhline(usable / unit.bytes, color=bad, linestyle=(0, (5, 3)), linewidth=1.4, label=f"usable of {clean(gpu)}")
    _scatter(axes, points, unit)
    if asked:
        style = {"markersize": 9, "zorder": 5, "color": bad, "markeredgecolor": placeholder("ground")}
        axes.plot([asked.speed], [asked.reserved / unit.bytes], marker="X", linestyle="none", label="does not fit", **style)
    _names(axes, [*points, *([asked] if asked else [])], unit, usable, sheet.narrow)
    axes.set_ylabel(f"reserved at the peak ({unit.name})")
    axes.set_xlabel("samples per second (an estimate, for ranking)")
    columns = 2 if sheet.narrow else 4
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handletextpad=0.5, columnspacing=1.4)


def _asked(stage: StagePlan) -> _Point | None:
    """The stage as asked, where it does not fit."""
    if stage.prediction.fits or stage.speed is None:
        return None
    return _Point(stage.speed.samples_per_second, words.needed_bytes(stage.prediction)[1], True, ("as asked",))


def _scatter(axes: Any, points: Sequence[_Point], unit: Unit) -> None:
    styles = (
        (True, "exact", {"marker": "o", "markersize": 5.5, "color": placeholder("accent"), "markeredgewidth": 0}),
        (False, "not exact", {"marker": "D", "markersize": 5.5, "markerfacecolor": "none", "color": placeholder("second")}),
    )
    for exact, label, style in styles:
        found = [point for point in points if point.exact is exact]
        if found:
            at = [point.speed for point in found], [point.reserved / unit.bytes for point in found]
            axes.plot(*at, linestyle="none", label=label, zorder=5, **style)


def _names(axes: Any, points: Sequence[_Point], unit: Unit, usable: int, narrow: bool) -> None:
    """The names of configurations: above their points, below near the card's line, and none on top of another."""
    ink, high = placeholder("ink"), axes.get_ylim()[1]
    every = [(point.speed, point.reserved) for point in points]
    joined: dict[tuple[float, int], list[str]] = {}
    for point in (point for point in points if point.names):
        joined.setdefault((point.speed, point.reserved), []).extend(point.names)
    spots = list(joined)
    near = [abs(reserved - usable) < high * unit.bytes / 8 for _, reserved in spots]
    wanted = [
        reserved / unit.bytes + (-1 if below else 1) * high / 30 for (_, reserved), below in zip(spots, near, strict=True)
    ]
    places = spread(wanted, high / 18, 0.03 * high, 0.97 * high)
    wide = axes.get_xlim()[1]
    letter = (0.026 if narrow else 0.012) * wide
    for (speed, reserved), place in zip(spots, places, strict=True):
        said = ", ".join(dict.fromkeys(joined[speed, reserved]))
        right = speed + letter * (len(said) + 3)
        left = speed - letter * (len(said) + 3)
        covered = [
            sum(abs(y / unit.bytes - place) < high / 25 and min(speed, end) < x < max(speed, end) for x, y in every)
            for end in (left, right)
        ]
        before = right > wide or (left > 0 and covered[0] < covered[1])
        offset = (0.03 if narrow else 0.02) * wide * (-1 if before else 1)
        axes.plot([speed], [reserved / unit.bytes], marker="o", markersize=10, markerfacecolor="none", color=ink, zorder=5)
        axes.plot([speed, speed + offset * 0.8], [reserved / unit.bytes, place], color=placeholder("muted"), linewidth=0.7)
        style = {"ha": "right" if before else "left", "va": "center", "color": ink, "fontsize": 9.5, "plate": True}
        text(axes, speed + offset, place, said, **style)
