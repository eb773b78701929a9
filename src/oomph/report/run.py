"""A run as a terminal screen: what was trained, how the loss went, how far memory was from its prediction, what went wrong."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from oomph.records import Choice, Recovery
from oomph.report import expert_loads, words
from oomph.report.lines import NARROWEST, clean, field, hanging, kept, paragraph, printed, rule
from oomph.run_records import RunStage, RunSummary
from oomph.units import size

_SHOWN = 5
"""Recoveries and names of samples that are written out for a stage."""
_KNOBS = ("checkpointing", "vision_checkpointing", "loss")


def render(run: RunSummary, width: int = 80, color: bool = False) -> str:
    """The run as text.

    Args:
        run: what to show.
        width: cells of a line; below 70 it is taken as 70.
        color: whether to add escape codes for colour and weight; the words are the same.
    """
    width = max(width, NARROWEST)
    where = clean(run.gpu) + (" (CPU)" if run.device == "cpu" else "")
    lines = [*paragraph(f"{clean(run.recipe)} trained on {where}", width, 0, "bold"), Text()]
    for note in run.notes:
        lines += hanging(clean(note), width, 2)
    lines += [Text()] if run.notes else []
    for stage in run.stages:
        lines += [*_stage(stage, width), Text()]
    software = ", ".join(kept(f"{clean(name)} {clean(version)}") for name, version in run.versions.items())
    lines += [rule("all stages", width), Text(), *field("trained with", [software], width)]
    lines += field("date", [clean(run.date)], width)
    lines += field("folder", [clean(run.folder)], width)
    lines += field("model", [clean(run.model) or "none yet"], width)
    return printed(lines, color)


def recovery(found: Recovery) -> str:
    """What went wrong in a step, which rung was taken, and that the step was redone."""
    where = f" in {clean(found.module)}" if found.module else ""
    who = {"allocator": "memory ran out", "accelerator": "the device ran out of memory", "retries": "memory was tight"}
    taken = f"{size(found.predicted_bytes)} predicted"
    if found.measured_bytes is not None:
        taken += f", {size(found.measured_bytes)} taken by then"
    said = clean(found.message).rstrip(".")
    name = f"step {found.step:,}" if found.step else "the dry run"
    happened = f"{name}: {who[found.kind]} in the {found.phase} of micro-batch {found.micro_batch + 1}{where}: {said} ({taken})"
    if found.kind == "retries":
        return f"{happened}; the next steps take less"
    if not found.to_split:
        return f"{happened}; nothing of the step was left to train on"
    before, after = kept(words.sizes(found.from_split)), kept(words.sizes(found.to_split))
    return f"{happened}; redone with the same samples{_rung(found)}, cut {before} → {after}"


def _rung(found: Recovery) -> str:
    changes = words.changes(found.from_choice, found.to_choice, _KNOBS)
    return f" on the next rung, {changes}" if changes else " on the same rung"


def _stage(stage: RunStage, width: int) -> list[Text]:
    lines = [rule(clean(stage.name), width), Text()]
    of = f" of {stage.planned_steps:,}" if stage.steps < stage.planned_steps else ""
    done = f"{stage.steps:,}{of}"
    seen = f"{words.counted(stage.samples, 'sample')}, {words.counted(stage.tokens, 'token')}"
    lines += field("steps", [f"{done}: {seen}"], width)
    lines += field("trained", map(clean, stage.trained), width)
    lines += field("not exact", map(clean, stage.inexact), width)
    lines += field("ran as", [_settings(stage.choice)], width)
    lines += field("loss", [_loss(stage)], width)
    if stage.evaluations:
        lines += field("evaluated", [_evaluated(stage)], width)
    lines += field("experts", expert_loads.sentences(stage.experts, stage.balance_loss), width)
    lines += field("memory", _memory(stage), width)
    lines += field("speed", [_speed(stage)], width)
    lines += field("recoveries", [words.counted(len(stage.recoveries), "time") if stage.recoveries else "none"], width)
    for found in stage.recoveries[:_SHOWN]:
        lines += hanging(recovery(found), width)
    lines += [Text(f"    and {len(stage.recoveries) - _SHOWN:,} more")] if len(stage.recoveries) > _SHOWN else []
    for what, names in (("left out", stage.skipped), ("made smaller", stage.shrunk)):
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
            lines += field(what, [f"{words.counted(len(names), 'sample')}: {clean(', '.join(names[:_SHOWN]))}{more}"], width)
    return lines


def _settings(choice: Choice) -> str:
    names = ("checkpointing", "vision_checkpointing", "attention", "loss", "precision", "optimizer")
    return ", ".join(kept(words.knob(name, getattr(choice, name))) for name in names)


def _loss(stage: RunStage) -> str:
    if stage.first_loss is None or stage.last_loss is None:
        return "none: no step had a label"
    return f"{stage.first_loss:.4f} in the first step, {stage.last_loss:.4f} in the last"


def _evaluated(stage: RunStage) -> str:
    best, last = min(stage.evaluations, key=lambda found: found.loss), stage.evaluations[-1]
    held_out = f"{words.counted(last.samples, 'sample')}, {words.counted(last.label_tokens, 'label token')}"
    return f"{last.loss:.4f} after step {last.step:,}, at best {best.loss:.4f} after step {best.step:,}; {held_out}"


def _memory(stage: RunStage) -> Iterator[str]:
    if stage.predicted_peak_bytes is None:
        return
    peak = f"peak {size(stage.predicted_peak_bytes)} predicted"
    if stage.measured_peak_bytes is not None:
        peak += f", {size(stage.measured_peak_bytes)} measured"
    yield f"{peak}; {size(stage.limit_bytes)} allowed"
    if stage.worst_error == 0:
        yield "predicted to the byte in every step"
    elif stage.worst_error is not None and stage.mean_error is not None:
        yield f"predicted less measured: {_percent(stage.mean_error)} on average, {_percent(stage.worst_error)} at the most"


def _percent(share: float) -> str:
    return kept(f"{100 * share:+.3f} %" if share else "0 %")


def _speed(stage: RunStage) -> str:
    rate = stage.samples_per_second
    if rate is None or not stage.steps:
        return "no step ran"
    spent = stage.seconds["data"] + stage.seconds["step"]
    waited = 100 * stage.seconds["data"] / spent
    each = words.seconds(stage.seconds["step"] / stage.steps)
    tokens = words.number(stage.tokens / spent)
    return f"{words.number(rate)} samples/s, {tokens} tokens/s, {each} a step; {waited:.1f} % of it waiting for data"
