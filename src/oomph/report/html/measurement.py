"""A measurement as the parts of a page: predicted against measured, for every micro-batch and phase, with the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from oomph.records import Footprint, MeasuredRung, MeasuredStage, Measurement
from oomph.report import words
from oomph.report.html.colours import placeholder
from oomph.report.html.drawing import Chart, Sheet, chart
from oomph.report.html.memory_chart import unit_of
from oomph.report.html.plan import Figure
from oomph.report.html.tables import Cell, Table, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean
from oomph.units import GIB, KIB, MIB, size

_PHASES = {"evaluate": "evaluation"}
_PEAKS: dict[str, Callable[[Footprint], int]] = {
    "allocated": lambda footprint: footprint.allocated_peak_bytes,
    "reserved": lambda footprint: footprint.reserved_peak_bytes,
}
_COLOURS = {"allocated": "accent", "reserved": "second"}


def context(measurement: Measurement) -> dict[str, Any]:
    """What the template of a measurement's page needs."""
    where = clean(measurement.gpu) + (" (CPU)" if measurement.device == "cpu" else "")
    software = [f"{clean(name)} {clean(version)}" for name, version in measurement.versions.items()]
    software += [f"driver {clean(measurement.driver)}"] if measurement.driver else []
    software += [f"CUDA {clean(measurement.cuda)}"] if measurement.cuda else []
    return {
        "kind": "measurement",
        "title": f"{clean(measurement.recipe)} measured on {where}",
        "remarks": list(map(clean, measurement.notes)),
        "within": measurement.within,
        "stages": [_stage(stage, measurement.device == "cuda") for stage in measurement.stages],
        "date": clean(measurement.date),
        "versions": software,
    }


def _stage(stage: MeasuredStage, cuda: bool) -> dict[str, Any]:
    ran = [rung for rung in stage.rungs if rung.measured is not None]
    peaks = [what for what in _PEAKS if what == "allocated" or cuda]
    wrong = sum(not rung.within for rung in stage.rungs)
    verdict = "not measured: not even the smallest micro-batch is predicted to fit"
    if stage.rungs:
        sizes = words.counted(len(stage.rungs), "micro-batch size")
        verdict = f"{wrong} of {sizes} not within the error bound" if wrong else f"{sizes}, all within the error bound"
    images = f", {words.counted(stage.images_per_sample, 'image')} each" if stage.images_per_sample else ""
    tables = [_table(what, ran) for what in peaks] + [_phases(ran), _speeds(ran)]
    return {
        "name": clean(stage.name),
        "within": bool(stage.rungs) and not wrong,
        "verdict": verdict,
        "failures": [_failure(rung) for rung in stage.rungs if not rung.measured],
        "figures": list(_figures(ran)),
        "charts": [_chart(peaks, ran)] if ran else [],
        "tables": [found for found in tables if found.rows],
        "notes": [
            ("sample", (f"{stage.samples_tokens:,} tokens{images}; all of them as long as the longest",)),
            ("climb ended", (clean(stage.stopped),)),
        ],
    }


def _failure(rung: MeasuredRung) -> str:
    return f"micro-batch {rung.choice.micro_batch:,} failed: {clean(rung.failure)}"


def _difference(rung: MeasuredRung, peak: Callable[[Footprint], int]) -> int:
    assert rung.measured is not None
    return peak(rung.predicted) - peak(rung.measured)


def _figures(ran: Sequence[MeasuredRung]) -> Iterator[Figure]:
    if not ran:
        return
    worst = max((_difference(rung, peak) for rung in ran for peak in _PEAKS.values()), key=abs)
    exact = sum(not _difference(rung, peak) for rung in ran for peak in _PEAKS.values())
    yield Figure(f"{worst:+,} B" if worst else "0 B", "the largest error: predicted less measured")
    yield Figure(f"{exact} of {len(ran) * len(_PEAKS)}", "peaks equal to the byte")
    yield Figure(size(max(rung.bound_bytes for rung in ran)), "error bound of the largest step")
    largest = ran[-1]
    assert largest.measured is not None
    what = f"allocated at micro-batch {largest.choice.micro_batch:,}, measured"
    yield Figure(size(largest.measured.allocated_peak_bytes), what)


def _chart(peaks: Sequence[str], ran: Sequence[MeasuredRung]) -> Chart:
    worst = max((_difference(rung, _PEAKS[what]) for rung in ran for what in peaks), key=abs)
    label = (
        f"Predicted and measured peaks of {words.counted(len(ran), 'micro-batch size')}. The prediction is furthest off by "
        f"{worst:+,} bytes; the error bound is {size(min(rung.bound_bytes for rung in ran))} or more."
    )
    head = [
        "micro-batch",
        *(f"{what}, {which}" for what in peaks for which in ("predicted", "measured", "error")),
        "error bound",
    ]
    rows = []
    for rung in ran:
        assert rung.measured is not None
        cells = [number(f"{rung.choice.micro_batch:,}")]
        for what in peaks:
            pair = _PEAKS[what](rung.predicted), _PEAKS[what](rung.measured)
            cells += [*(number(f"{nbytes:,}") for nbytes in pair), number(f"{pair[0] - pair[1]:+,}")]
        rows.append([*cells, number(f"{rung.bound_bytes:,}")])
    title = "Predicted against measured, and the error"
    return chart(title, label, lambda sheet: _fill(sheet, peaks, ran), table("Bytes", head, rows), (4.0, 6.2))


def _fill(sheet: Sheet, peaks: Sequence[str], ran: Sequence[MeasuredRung]) -> None:
    above, below = sheet.figure.subplots(2, 1) if sheet.narrow else sheet.figure.subplots(1, 2)
    width = 0.8 / len(peaks)
    for place, what in enumerate(peaks):
        at = [rank - 0.4 + width * (place + 0.5) for rank in range(len(ran))]
        _bars(above, at, what, ran, width, place == 0)
        _errors(below, at, what, ran)
    _bounds(below, ran)
    for axes in (above, below):
        axes.set_xticks(range(len(ran)), [f"{rung.choice.micro_batch:,}" for rung in ran])
        axes.set_xlabel("micro-batch")
        axes.grid(axis="x", visible=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)


def _bars(axes: Any, at: Sequence[float], what: str, ran: Sequence[MeasuredRung], width: float, first: bool) -> None:
    """What was measured as bars, what was predicted as a line across each."""
    measured = [_PEAKS[what](rung.measured) for rung in ran if rung.measured]
    unit = unit_of(max(peak(rung.measured) for rung in ran if rung.measured for peak in _PEAKS.values()))
    heights = [nbytes / unit.bytes for nbytes in measured]
    axes.bar(at, heights, 0.92 * width, color=placeholder(_COLOURS[what]), label=f"{what}, measured")
    predicted = [_PEAKS[what](rung.predicted) / unit.bytes for rung in ran]
    ends = [middle - 0.46 * width for middle in at], [middle + 0.46 * width for middle in at]
    axes.hlines(predicted, *ends, color=placeholder("ink"), linewidth=2, label="predicted" if first else "_")
    axes.set_ylabel(f"peak ({unit.name})")


def _errors(axes: Any, at: Sequence[float], what: str, ran: Sequence[MeasuredRung]) -> None:
    unit, name = _unit_of_errors(ran)
    errors = [_difference(rung, _PEAKS[what]) / unit for rung in ran]
    style = {"marker": "o" if what == "allocated" else "s", "markersize": 7, "linestyle": "none"}
    axes.plot(at, errors, color=placeholder(_COLOURS[what]), label=f"{what}, error", zorder=3, **style)
    axes.set_ylabel(f"predicted less measured ({name})")


def _bounds(axes: Any, ran: Sequence[MeasuredRung]) -> None:
    """The error bound of each rung as a band around zero."""
    unit, _ = _unit_of_errors(ran)
    good, starts = placeholder("good"), [rank - 0.45 for rank in range(len(ran))]
    edges = [rung.bound_bytes / unit for rung in ran]
    axes.bar(starts, [2 * edge for edge in edges], 0.9, [-edge for edge in edges], align="edge", color=good, alpha=0.13)
    ends = [start + 0.9 for start in starts]
    axes.hlines(edges, starts, ends, color=good, linewidth=1, label="error bound")
    axes.hlines([-edge for edge in edges], starts, ends, color=good, linewidth=1)
    axes.axhline(0, color=placeholder("muted"), linewidth=0.8)
    most = max([*edges, *(abs(_difference(rung, peak)) / unit for rung in ran for peak in _PEAKS.values())])
    axes.set_ylim(-1.15 * most, 1.15 * most)


def _unit_of_errors(ran: Sequence[MeasuredRung]) -> tuple[int, str]:
    most = max(max(rung.bound_bytes, *(abs(_difference(rung, peak)) for peak in _PEAKS.values())) for rung in ran)
    return next((pair for pair in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")) if most >= pair[0]), (1, "bytes"))


def _row(name: str, predicted: int, measured: int, good: bool = True) -> list[Cell]:
    difference = predicted - measured
    share = f"{100 * difference / measured:+.3f} %" if measured and abs(difference) < 10 * measured else ""
    numbers = [number(f"{predicted:,}"), number(f"{measured:,}"), number(f"{difference:+,}"), number(share)]
    return [cell(name), *numbers, cell("✓ within" if good else "✗ outside", "good" if good else "bad")]


def _table(what: str, ran: Sequence[MeasuredRung]) -> Table:
    rows = []
    for rung in ran:
        assert rung.measured is not None
        pair = _PEAKS[what](rung.predicted), _PEAKS[what](rung.measured)
        rows.append(_row(f"{rung.choice.micro_batch:,}", *pair, abs(pair[0] - pair[1]) <= rung.bound_bytes))
    head = ("micro-batch", "predicted", "measured", "difference", "", "error bound")
    return table(f"{what.capitalize()} peak in bytes", head, rows)


def _phases(ran: Sequence[MeasuredRung]) -> Table:
    """The allocated peak of each phase of every rung, the largest micro-batch first."""
    rows = []
    for rung in reversed(ran):
        predicted = {peak.phase: peak.allocated_peak_bytes for peak in rung.predicted.phases}
        for peak in rung.measured.phases if rung.measured else ():
            if peak.phase in predicted:
                pair = predicted[peak.phase], peak.allocated_peak_bytes
                row = _row(_PHASES.get(peak.phase, peak.phase), *pair, abs(pair[0] - pair[1]) <= rung.bound_bytes)
                rows.append([number(f"{rung.choice.micro_batch:,}"), *row])
    head = ("micro-batch", "phase", "predicted", "measured", "difference", "", "error bound")
    return table("Allocated peak of each phase in bytes", head, rows)


def _speeds(ran: Sequence[MeasuredRung]) -> Table:
    rows = [
        [
            number(f"{rung.choice.micro_batch:,}"),
            number(words.seconds(rung.step_seconds) if rung.step_seconds else ""),
            number(words.number(rung.samples_per_second) if rung.samples_per_second else ""),
            number(words.number(rung.tokens_per_second) if rung.tokens_per_second else ""),
            number("" if rung.utilisation is None else f"{100 * rung.utilisation:.0f} %"),
            number("" if rung.sm_activity is None else f"{100 * rung.sm_activity:.0f} %"),
            number("" if rung.process_peak_bytes is None else size(rung.process_peak_bytes)),
            number("" if rung.outside_bytes is None else size(rung.outside_bytes)),
        ]
        for rung in ran
    ]
    head = ("micro-batch", "step", "samples/s", "tokens/s", "busy", "SMs", "process", "outside the allocator")
    return table("Speed and load", head, rows)
