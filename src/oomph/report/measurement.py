"""A measurement as a terminal screen: predicted against measured, for every micro-batch that was run, in whole bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich.text import Text

from oomph.records import Footprint, MeasuredRung, MeasuredStage, Measurement
from oomph.report import words
from oomph.report.lines import NARROWEST, clean, columns, field, hanging, kept, paragraph, printed, rule
from oomph.units import size

_FIRST, _BYTES, _DIFFERENCE, _PERCENT = 11, 15, 15, 9
_PHASES = {"evaluate": "evaluation"}


def render(measurement: Measurement, width: int = 80, color: bool = False) -> str:
    """The measurement as text.

    Args:
        measurement: what to show.
        width: cells of a line; below 70 it is taken as 70. Tables of bytes take 77 cells whatever it is.
        color: whether to add escape codes for colour and weight; the words are the same.
    """
    width = max(width, NARROWEST)
    where = clean(measurement.gpu) + (" (CPU)" if measurement.device == "cpu" else "")
    lines = [*paragraph(f"{clean(measurement.recipe)} measured on {where}", width, 0, "bold"), Text()]
    for note in measurement.notes:
        lines += hanging(clean(note), width, 2)
    lines += [Text()] if measurement.notes else []
    for stage in measurement.stages:
        lines += [*_stage(stage, measurement.device == "cuda", width), Text()]
    software = [f"{name} {version}" for name, version in measurement.versions.items()]
    software += [f"driver {measurement.driver}"] if measurement.driver else []
    software += [f"CUDA {measurement.cuda}"] if measurement.cuda else []
    lines += [rule("all stages", width), Text(), *field("measured with", [clean(", ".join(map(kept, software)))], width)]
    lines += field("date", [clean(measurement.date)], width)
    verdict = "every prediction is within its error bound" if measurement.within else "not every prediction holds"
    return printed([*lines, Text(), *paragraph(verdict, width, 2, _style(measurement.within))], color)


def _style(good: bool) -> str:
    return "bold green" if good else "bold red"


def _stage(stage: MeasuredStage, cuda: bool, width: int) -> list[Text]:
    within = bool(stage.rungs) and all(rung.within for rung in stage.rungs)
    lines = [rule(clean(stage.name), width), Text(), *paragraph(_verdict(stage.rungs), width, 2, _style(within))]
    for rung in stage.rungs:
        lines += [line for sentence in _complaints(rung) for line in hanging(sentence, width)]
    ran = [rung for rung in stage.rungs if rung.measured is not None]
    if stage.rungs:
        images = f", {words.counted(stage.images_per_sample, 'image')} each" if stage.images_per_sample else ""
        sample = f"{stage.samples_tokens:,} tokens{images}; all of them as long as the longest"
        lines += [Text(), *field("sample", [sample], width), *field("step", [_step(stage.rungs[0])], width)]
    if ran:
        for what, peak in _PEAKS.items():
            if what == "allocated" or cuda:
                lines += [Text(), *_table(f"{what} peak in bytes", [(f"{r.choice.micro_batch}", r, peak) for r in ran])]
        last = ran[-1]
        lines += [Text(), *_phases(last)]
        lines += [Text(), *_speeds(ran, width)]
    return [*lines, Text(), *field("climb ended", [clean(stage.stopped)], width)]


def _verdict(rungs: Sequence[MeasuredRung]) -> str:
    if not rungs:
        return "not measured: not even the smallest micro-batch is predicted to fit"
    wrong = sum(not rung.within for rung in rungs)
    if wrong:
        return f"{wrong} of {words.counted(len(rungs), 'micro-batch size')} not within the error bound"
    return f"{words.counted(len(rungs), 'micro-batch size')}, all within the error bound"


def _complaints(rung: MeasuredRung) -> Iterator[str]:
    """What is wrong with a rung, in sentences."""
    name = f"micro-batch {rung.choice.micro_batch}"
    if rung.measured is None:
        yield f"{name} failed: {clean(rung.failure)}"
        return
    for what, peak in _PEAKS.items():
        difference = peak(rung.predicted) - peak(rung.measured)
        if abs(difference) > rung.bound_bytes:
            side = "more" if difference > 0 else "less"
            far = f"{size(abs(difference))} {side} is predicted than was {what}"
            yield f"{name}: {far}, and the error bound is {size(rung.bound_bytes)}"


def _step(rung: MeasuredRung) -> str:
    choice = rung.choice
    names = ("checkpointing", "vision_checkpointing", "attention", "loss", "precision", "optimizer")
    knobs = ", ".join(kept(words.knob(name, getattr(choice, name))) for name in names)
    return f"{'one micro-batch' if choice.accumulation == 1 else f'{choice.accumulation} micro-batches'} of a size; {knobs}"


_PEAKS: dict[str, Callable[[Footprint], int]] = {
    "allocated": lambda footprint: footprint.allocated_peak_bytes,
    "reserved": lambda footprint: footprint.reserved_peak_bytes,
}


def _table(title: str, rows: Sequence[tuple[str, MeasuredRung, Callable[[Footprint], int]]]) -> list[Text]:
    lines = [*paragraph(title, 80, 2, "bold"), _head("micro-batch")]
    for name, rung, peak in rows:
        assert rung.measured is not None
        lines.append(_row(name, peak(rung.predicted), peak(rung.measured), rung.within))
    return lines


def _head(first: str) -> Text:
    names = (("predicted", -_BYTES), ("measured", -_BYTES), ("difference", -_DIFFERENCE))
    return columns([(first, _FIRST, "dim"), *((name, cells, "dim") for name, cells in names)])


def _row(name: str, predicted: int, measured: int, good: bool = True) -> Text:
    difference = predicted - measured
    share = f"{100 * difference / measured:+.3f} %" if abs(difference) < 10 * measured else ""
    cells = [(f"{predicted:,}", -_BYTES, ""), (f"{measured:,}", -_BYTES, "")]
    style = "" if good else "red"
    return columns([(name, _FIRST, ""), *cells, (f"{difference:+,}", -_DIFFERENCE, style), (share, -_PERCENT, style)])


def _phases(rung: MeasuredRung) -> list[Text]:
    """The allocated peak of each phase of one rung."""
    assert rung.measured is not None
    predicted = {peak.phase: peak.allocated_peak_bytes for peak in rung.predicted.phases}
    lines = [*paragraph(f"allocated peak of each phase, micro-batch {rung.choice.micro_batch}", 80, 2, "bold"), _head("phase")]
    for peak in rung.measured.phases:
        if peak.phase in predicted:
            name = clean(_PHASES.get(peak.phase, peak.phase))
            lines.append(_row(name, predicted[peak.phase], peak.allocated_peak_bytes))
    return lines


def _speeds(rungs: Sequence[MeasuredRung], width: int) -> list[Text]:
    """Time of a step, rates, how busy the device was, and what the process took of it."""
    lines = paragraph("speed and load", width, 2, "bold")
    for rung in rungs:
        shown = [f"{words.seconds(rung.step_seconds)} a step"] if rung.step_seconds else []
        shown += [f"{words.number(rung.samples_per_second)} samples/s"] if rung.samples_per_second else []
        shown += [f"{words.number(rung.tokens_per_second)} tokens/s"] if rung.tokens_per_second else []
        shown += [f"busy {100 * rung.utilisation:.0f} %"] if rung.utilisation is not None else []
        shown += [f"SMs {100 * rung.sm_activity:.0f} %"] if rung.sm_activity is not None else []
        shown += [f"process {size(rung.process_peak_bytes)}"] if rung.process_peak_bytes is not None else []
        shown += [f"outside the allocator {size(rung.outside_bytes)}"] if rung.outside_bytes is not None else []
        lines += field(f"  {rung.choice.micro_batch}", [", ".join(map(kept, shown))], width, _FIRST + 6)
    return lines
