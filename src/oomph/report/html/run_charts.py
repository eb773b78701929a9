"""A run's log as charts: loss, learning rates, memory predicted and measured, speed and the wait for data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from oomph.report import words
from oomph.report.html.colours import placeholder
from oomph.report.html.drawing import Chart, Sheet, chart, text
from oomph.report.html.memory_chart import unit_of
from oomph.report.html.tables import Cell, Table, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean
from oomph.run_records import EvaluationRecord, StepRecord
from oomph.units import size

_FEW = 40
"""Steps up to which each is marked with a point."""
_POINTS = 600
"""Stretches of steps of which a line has the least and the most."""
_ROWS = 60
_COLOURS = ("accent", "second", "third", "good", "scores", "input", "muted")

Value = Callable[[StepRecord], float | None]


class Steps(NamedTuple):
    """The steps of all stages one after the other: `before` is how many steps the stages before each have."""

    lines: tuple[StepRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]
    before: dict[str, int]

    def at(self, line: StepRecord | EvaluationRecord) -> int:
        """The number of a step over all stages."""
        return self.before[line.stage] + line.step


def steps_of(log: Sequence[StepRecord | EvaluationRecord]) -> Steps:
    """The steps of a log, without the dry runs before them."""
    lines = tuple(line for line in log if isinstance(line, StepRecord) and line.step)
    before: dict[str, int] = {}
    total = 0
    for line in lines:
        if line.stage not in before:
            before[line.stage] = total
            total += line.steps
    evaluations = tuple(line for line in log if isinstance(line, EvaluationRecord) and line.stage in before)
    return Steps(lines, evaluations, before)


def run_charts(steps: Steps) -> Iterator[Chart]:
    """All charts for which the log has numbers."""
    if not steps.lines:
        return
    if any(line.loss is not None for line in steps.lines):
        yield _loss_chart(steps)
    if any(line.predicted_peak_bytes or line.measured_peak_bytes for line in steps.lines):
        yield _memory_chart(steps)
    yield _speed_chart(steps)
    if any(line.balance_loss is not None for line in steps.lines):
        yield _balance_chart(steps)
    if any(line.learning_rates for line in steps.lines):
        yield _rates_chart(steps)


def _loss_chart(steps: Steps) -> Chart:
    losses = [line.loss for line in steps.lines if line.loss is not None]
    label = f"The loss goes from {losses[0]:.4f} in the first step to {losses[-1]:.4f} in the last of {len(steps.lines):,}."
    if steps.evaluations:
        best = min(steps.evaluations, key=lambda found: found.loss)
        label += f" On held-out data it is {steps.evaluations[-1].loss:.4f} at the end, {best.loss:.4f} at best."

    def fill(sheet: Sheet) -> None:
        axes = _axes(sheet, steps)
        _line(axes, steps, lambda line: line.loss, "training, each step", color=placeholder("accent"))
        if steps.evaluations:
            at = [steps.at(line) for line in steps.evaluations], [line.loss for line in steps.evaluations]
            style = {"marker": "D", "markersize": 5, "linestyle": "--", "color": placeholder("second")}
            axes.plot(*at, label="held-out data", **style)
        _marks(axes, steps, lambda line: line.loss)
        axes.set_ylabel("loss (nats per label token)")
        _legend(axes, sheet)

    columns: list[tuple[str, Callable[[StepRecord], Cell]]] = [
        ("loss", lambda line: number("" if line.loss is None else f"{line.loss:.4f}")),
        ("gradient norm", lambda line: number("" if line.grad_norm is None else f"{line.grad_norm:.3f}")),
    ]
    return chart("Loss", label, fill, _numbers(steps, columns), (3.6, 3.4))


def _memory_chart(steps: Steps) -> Chart:
    peaks = [peak for line in steps.lines for peak in (line.predicted_peak_bytes, line.measured_peak_bytes) if peak]
    most, limit = max(peaks), max(line.limit_bytes for line in steps.lines)
    unit = unit_of(most)
    label = f"No step takes more than {size(most)}, predicted or measured; {size(limit)} is allowed."
    errors = [line.prediction_error_bytes for line in steps.lines if line.prediction_error_bytes is not None]
    if errors:
        worst = max(errors, key=abs)
        label += f" The prediction is furthest from the measurement by {size(worst)}."

    def fill(sheet: Sheet) -> None:
        axes = _axes(sheet, steps)
        _line(axes, steps, lambda line: _scaled(line.measured_peak_bytes, unit.bytes), "measured", color=placeholder("accent"))
        dots = {"color": placeholder("second"), "linestyle": (0, (1, 1.5)), "linewidth": 2.4}
        _line(axes, steps, lambda line: _scaled(line.predicted_peak_bytes, unit.bytes), "predicted", **dots)
        if limit <= 3 * most:
            dashes = {"color": placeholder("bad"), "linestyle": (0, (5, 3)), "linewidth": 1.4}
            _line(axes, steps, lambda line: line.limit_bytes / unit.bytes, "allowed", **dashes)
        _marks(axes, steps, lambda line: (line.measured_peak_bytes or line.predicted_peak_bytes or 0) / unit.bytes)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"peak of the step ({unit.name})")
        if limit > 3 * most:
            place = {"xycoords": "axes fraction", "xytext": (4, -12), "textcoords": "offset points", "fontsize": 9}
            text(axes, 0, 1, f"↑ allowed: {size(limit)}, above this chart", color=placeholder("bad"), **place)
        _legend(axes, sheet)

    columns: list[tuple[str, Callable[[StepRecord], Cell]]] = [
        ("predicted", lambda line: _bytes(line.predicted_peak_bytes)),
        ("measured", lambda line: _bytes(line.measured_peak_bytes)),
        ("error", lambda line: _bytes(line.prediction_error_bytes)),
        ("allowed", lambda line: _bytes(line.limit_bytes)),
    ]
    return chart("Memory, predicted and measured", label, fill, _numbers(steps, columns), (3.8, 3.6))


def _speed_chart(steps: Steps) -> Chart:
    spent = sum(map(_spent, steps.lines))
    waited = sum(line.seconds.get("data", 0.0) for line in steps.lines)
    rate = sum(line.samples for line in steps.lines) / spent if spent else 0.0
    share = 100 * waited / spent if spent else 0.0
    label = f"{words.number(rate)} samples a second over all steps; {share:.1f} % of their time is a wait for data."

    def fill(sheet: Sheet) -> None:
        above, below = sheet.figure.subplots(2, 1, sharex=True)
        for axes in (above, below):
            _stages(axes, steps, named=axes is above)
        _line(above, steps, _rate, "", color=placeholder("accent"))
        above.set_ylabel("samples/s")
        above.set_ylim(bottom=0)
        _line(below, steps, _wait, "", color=placeholder("third"))
        below.set_ylabel("wait for data (%)")
        below.set_ylim(0, max(5.0, 1.1 * max((_wait(line) or 0.0 for line in steps.lines), default=0.0)))
        below.set_xlabel("step")

    columns: list[tuple[str, Callable[[StepRecord], Cell]]] = [
        ("samples/s", lambda line: number(words.number(_rate(line) or 0.0))),
        ("step", lambda line: number(words.seconds(line.seconds.get("step", 0.0)))),
        ("wait for data", lambda line: number(f"{_wait(line) or 0.0:.1f} %")),
    ]
    return chart("Speed, and the wait for data", label, fill, _numbers(steps, columns), (4.2, 4.2))


def _balance_chart(steps: Steps) -> Chart:
    losses = [line.balance_loss for line in steps.lines if line.balance_loss is not None]
    label = f"The balance loss goes from {losses[0]:.3f} to {losses[-1]:.3f}; 1 is an even load of all experts."

    def fill(sheet: Sheet) -> None:
        axes = _axes(sheet, steps)
        _line(axes, steps, lambda line: line.balance_loss, "balance loss", color=placeholder("accent"))
        axes.axhline(1, color=placeholder("good"), linewidth=1, linestyle=(0, (5, 3)), label="even load")
        axes.set_ylabel("balance loss")
        _legend(axes, sheet)

    columns: list[tuple[str, Callable[[StepRecord], Cell]]] = [
        ("balance loss", lambda line: number("" if line.balance_loss is None else f"{line.balance_loss:.4f}")),
        ("z loss", lambda line: number("" if line.z_loss is None else f"{line.z_loss:.4f}")),
    ]
    return chart("Balance of the experts", label, fill, _numbers(steps, columns), (3.0, 3.2))


def _rates_chart(steps: Steps) -> Chart:
    rules = list(dict.fromkeys(rule for line in steps.lines for rule in line.learning_rates))
    top = max(rate for line in steps.lines for rate in line.learning_rates.values())
    label = f"Learning rates of {words.counted(len(rules), 'rule')} of what trains, {top:.3g} at the most."

    def fill(sheet: Sheet) -> None:
        axes = _axes(sheet, steps)
        for place, rule in enumerate(rules):
            style = {"color": placeholder(_COLOURS[place % len(_COLOURS)]), "linestyle": ("-", "--", ":", "-.")[place % 4]}
            _line(axes, steps, functools.partial(_rate_of, rule), clean(rule), **style)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes.set_ylabel("learning rate")
        _legend(axes, sheet)

    columns = [(clean(rule), functools.partial(_learning_rate, rule)) for rule in rules]
    return chart("Learning rate", label, fill, _numbers(steps, columns), (3.0, 3.2))


def _rate_of(rule: str, line: StepRecord) -> float | None:
    return line.learning_rates.get(rule)


def _learning_rate(rule: str, line: StepRecord) -> Cell:
    return number(f"{line.learning_rates.get(rule, 0.0):.3g}")


def _scaled(nbytes: int | None, unit: int) -> float | None:
    return None if nbytes is None else nbytes / unit


def _bytes(nbytes: int | None) -> Cell:
    return number("" if nbytes is None else size(nbytes))


def _spent(line: StepRecord) -> float:
    return line.seconds.get("data", 0.0) + line.seconds.get("step", 0.0)


def _rate(line: StepRecord) -> float | None:
    return line.samples / _spent(line) if _spent(line) else None


def _wait(line: StepRecord) -> float | None:
    return 100 * line.seconds.get("data", 0.0) / _spent(line) if _spent(line) else None


def _axes(sheet: Sheet, steps: Steps) -> Any:
    axes = sheet.figure.subplots()
    _stages(axes, steps)
    axes.set_xlabel("step")
    return axes


def _stages(axes: Any, steps: Steps, named: bool = True) -> None:
    """Where each stage begins, with its name where there are several; the last step is the end of the axis."""
    last = max(map(steps.at, steps.lines))
    axes.set_xlim(0.5 if last > 1 else 0, last + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    starts = [*steps.before.items(), ("", last)]
    for (stage, start), (_, end) in pairwise(starts):
        axes.axvline(start + 0.5, color=placeholder("line"), linewidth=1, zorder=0)
        if named and len(steps.before) > 1:
            place = {"xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points", "ha": "center"}
            text(axes, (start + end) / 2, 1, stage, color=placeholder("muted"), fontsize=9, **place)


def _line(axes: Any, steps: Steps, value: Value, label: str, **style: Any) -> None:
    """A line over the steps; where they are very many, the least and the most of each stretch of them."""
    points = [(steps.at(line), found) for line in steps.lines if (found := value(line)) is not None]
    if not points:
        return
    width = -(-len(points) // _POINTS)
    if width > 2:
        stretches = [points[start : start + width] for start in range(0, len(points), width)]
        ends = ((min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])) for part in stretches)
        points = [point for pair in ends for point in sorted(set(pair))]
    marker = {"marker": "o", "markersize": 3.5} if len(points) <= _FEW else {}
    axes.plot([x for x, _ in points], [y for _, y in points], label=label or "_", **{**marker, **style})


def _marks(axes: Any, steps: Steps, value: Value) -> None:
    """Crosses at the steps in which memory ran out."""
    found = [(steps.at(line), value(line)) for line in steps.lines if line.recoveries]
    points = [(x, y) for x, y in found if y is not None]
    if points:
        style = {"marker": "X", "markersize": 9, "linestyle": "none", "markeredgecolor": placeholder("ground")}
        axes.plot([x for x, _ in points], [y for _, y in points], color=placeholder("bad"), label="memory ran out", **style)


def _legend(axes: Any, sheet: Sheet) -> None:
    lift = 1.08 if axes.texts else 1.0
    axes.legend(loc="lower left", bbox_to_anchor=(0, lift), ncols=2 if sheet.narrow else 4, borderaxespad=0.2)


def _numbers(steps: Steps, columns: Sequence[tuple[str, Callable[[StepRecord], Cell]]]) -> Table:
    """The numbers of some steps, evenly over all of them, and of those in which memory ran out."""
    lines = steps.lines
    width = -(-len(lines) // _ROWS)
    shown = [line for place, line in enumerate(lines) if place % width == 0 or place == len(lines) - 1 or line.recoveries]
    more = "" if width == 1 else f"every {width}th step; log.jsonl has all {len(lines):,}"
    rows = [[cell(line.stage), number(f"{line.step:,}"), *(write(line) for _, write in columns)] for line in shown]
    return table(more or "every step", ("stage", "step", *(name for name, _ in columns)), rows)
