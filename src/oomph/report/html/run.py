"""A run as the parts of a page: curves from its log, what went wrong and how it went on, and each stage summed up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from oomph.records import Choice, Recovery
from oomph.report import words
from oomph.report.html.experts import expert_chart, named
from oomph.report.html.plan import Figure
from oomph.report.html.run_charts import run_charts, steps_of
from oomph.report.html.tables import Cell, Table, number, table
from oomph.report.html.tables import words as cell
from oomph.report.lines import clean
from oomph.run_records import EvaluationRecord, RunStage, RunSummary, StepRecord
from oomph.units import size

_SHOWN = 200
"""Recoveries in a table, and names of samples in a list."""
_WHO = {"allocator": "the allocator", "accelerator": "the device", "retries": "memory was tight"}
_KNOBS = tuple(item.name for item in fields(Choice) if item.name not in ("effective_batch", "gpus", "nodes"))


def context(run: RunSummary, log: Sequence[StepRecord | EvaluationRecord]) -> dict[str, Any]:
    """What the template of a run's page needs.

    Args:
        run: the summary.
        log: the run's log; empty where it is not at hand.
    """
    where = clean(run.gpu) + (" (CPU)" if run.device == "cpu" else "")
    steps = steps_of(log)
    return {
        "kind": "run",
        "title": f"{clean(run.recipe)} trained on {where}",
        "remarks": list(map(clean, run.notes)),
        "figures": list(_figures(run)),
        "charts": [*run_charts(steps), *filter(None, map(expert_chart, run.stages))],
        "logged": bool(steps.lines),
        "recoveries": _recoveries(run),
        "evaluations": _evaluations(run),
        "experts": named(run.stages),
        "stages": [(clean(stage.name), list(_stage(stage))) for stage in run.stages],
        "notes": list(_notes(run)),
        "versions": [f"{clean(name)} {clean(version)}" for name, version in run.versions.items()],
    }


def _figures(run: RunSummary) -> Iterator[Figure]:
    steps, planned = sum(stage.steps for stage in run.stages), sum(stage.planned_steps for stage in run.stages)
    yield Figure(f"{steps:,}", "steps" if steps == planned else f"steps of {planned:,}")
    losses = [stage.last_loss for stage in run.stages if stage.last_loss is not None]
    if losses:
        yield Figure(f"{losses[-1]:.4f}", "loss of the last step")
    peaks = [stage.measured_peak_bytes for stage in run.stages if stage.measured_peak_bytes is not None]
    if peaks:
        yield Figure(size(max(peaks)), "measured at the peak")
    errors = [stage.worst_error for stage in run.stages if stage.worst_error is not None]
    if errors:
        yield Figure(_signed(max(errors, key=abs)), "worst prediction error: predicted less measured")
    count = sum(len(stage.recoveries) for stage in run.stages)
    yield Figure(f"{count:,}", "time memory ran out" if count == 1 else "times memory ran out")
    rates = [stage.samples_per_second for stage in run.stages if stage.samples_per_second is not None]
    if rates:
        yield Figure(words.number(rates[-1]), "samples/s in the last stage")


def _signed(share: float) -> str:
    return f"{100 * share:+.3f} %" if share else "0 %"


def _recoveries(run: RunSummary) -> Table:
    found = [(stage.name, recovery) for stage in run.stages for recovery in stage.recoveries]
    more = f"; the first {_SHOWN} of {len(found):,}" if len(found) > _SHOWN else ""
    head = ("stage", "step", "micro-batch", "what ran out", "predicted", "allowed", "taken", "error", "went on with")
    rows = [[cell(stage), *_recovery(recovery)] for stage, recovery in found[:_SHOWN]]
    return table(f"When memory ran out, and what was done{more}", head, rows)


def _recovery(found: Recovery) -> list[Cell]:
    where = f" in {clean(found.module)}" if found.module else ""
    taken = found.measured_bytes
    return [
        number(f"{found.step:,}" if found.step else "dry run"),
        number(f"{found.micro_batch + 1:,}"),
        cell(f"{_WHO[found.kind]}, {found.phase}{where}"),
        number(size(found.predicted_bytes)),
        number(size(found.limit_bytes)),
        number("" if taken is None else size(taken)),
        number("" if taken is None else f"{size(found.predicted_bytes - taken)}"),
        cell(_went_on(found)),
    ]


def _went_on(found: Recovery) -> str:
    """The rung that was taken, and how the samples were cut."""
    if found.kind == "retries":
        return "the next steps take less"
    if not found.to_split:
        return "nothing was left to train on"
    changes = words.changes(found.from_choice, found.to_choice, _KNOBS)
    rung = f"next rung: {changes}" if changes else "same rung"
    return f"{rung}; cut {words.sizes(found.from_split)} → {words.sizes(found.to_split)}"


def _evaluations(run: RunSummary) -> Table:
    rows = [
        [
            cell(stage.name),
            number(f"{found.step:,}"),
            number(f"{found.loss:.4f}"),
            number(f"{found.samples:,}"),
            number(f"{found.label_tokens:,}"),
            number(words.seconds(found.seconds)),
        ]
        for stage in run.stages
        for found in stage.evaluations
    ]
    return table("Evaluations on held-out data", ("stage", "after step", "loss", "samples", "label tokens", "took"), rows)


def _stage(stage: RunStage) -> Iterator[tuple[str, tuple[str, ...]]]:
    of = f" of {stage.planned_steps:,}" if stage.steps < stage.planned_steps else ""
    seen = f"{words.counted(stage.samples, 'sample')}, {words.counted(stage.tokens, 'token')}"
    yield "steps", (f"{stage.steps:,}{of}: {seen}",)
    if stage.trained:
        yield "trained", tuple(map(clean, stage.trained))
    if stage.inexact:
        yield "not exact", tuple(map(clean, stage.inexact))
    yield "ran as", (", ".join(words.knob(name, getattr(stage.choice, name)) for name in _KNOBS),)
    if stage.first_loss is not None and stage.last_loss is not None:
        yield "loss", (f"{stage.first_loss:.4f} in the first step, {stage.last_loss:.4f} in the last",)
    yield from _memory(stage)
    rate = stage.samples_per_second
    if rate is not None and stage.steps:
        spent = stage.seconds["data"] + stage.seconds["step"]
        waited = f"{100 * stage.seconds['data'] / spent:.1f} % of the time waiting for data"
        yield "speed", (f"{words.number(rate)} samples/s, {words.number(stage.tokens / spent)} tokens/s; {waited}",)
    for what, names in (("left out", stage.skipped), ("made smaller", stage.shrunk)):
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            yield what, (f"{words.counted(len(names), 'sample')}: {clean(', '.join(names[:_SHOWN]))}{more}",)


def _memory(stage: RunStage) -> Iterator[tuple[str, tuple[str, ...]]]:
    if stage.predicted_peak_bytes is None:
        return
    peak = f"peak {size(stage.predicted_peak_bytes)} predicted"
    if stage.measured_peak_bytes is not None:
        peak += f", {size(stage.measured_peak_bytes)} measured"
    lines = [f"{peak}; {size(stage.limit_bytes)} allowed"]
    if stage.worst_error is not None and stage.mean_error is not None:
        mean, worst = _signed(stage.mean_error), _signed(stage.worst_error)
        lines.append(f"predicted less measured: {mean} on average, {worst} at the most")
    yield "memory", tuple(lines)


def _notes(run: RunSummary) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "folder", (clean(run.folder),)
    yield "model", (clean(run.model) or "none yet",)
    yield "date", (clean(run.date),)
