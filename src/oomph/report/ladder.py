"""The ways out, as parts of the screen: the ladder, what comes nearest, what is only suggested, what it would take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.cells import cell_len
from rich.text import Text

from oomph.records import Card, Choice, Limit, Prediction, Rung, Speed, StagePlan
from oomph.report import words
from oomph.report.lines import clean, columns, cut, field, hanging, kept, paragraph, percent, size_cells, wrap
from oomph.units import count, size

ROWS = 8
"""Rungs on the screen, unless more of them have names."""

SIMPLEST = 3
"""Of them, those that replace the fewest settings of the recipe."""

_FALLS = 2
_FALL = 0.05
_INDENT = 6
_LEAST = 12


def alternatives(stage: StagePlan, width: int) -> list[Text]:
    """All that a stage has beside its own prediction, each part after an empty line.

    Args:
        stage: the stage.
        width: cells of a line.
    """
    parts: tuple[Callable[[StagePlan, int], list[Text]], ...] = (_ladder, _named, _unpinned, _nearest, _suggestions, _fit)
    return [line for part in parts if (lines := part(stage, width)) for line in (Text(), *lines)]


def way_out(stage: StagePlan) -> str:
    """The settings that make a stage fit, or make it faster, as a sentence; nothing where there is none to say."""
    name = clean(stage.name)
    if not stage.ladder:
        nearest = stage.nearest
        return f"{name}: no configuration fits; the nearest {_lack(nearest.prediction)}" if nearest else ""
    fastest = stage.ladder[0]
    if stage.prediction.fits:
        faster = stage.unpinned or fastest
        saved = _saved(faster, stage)
        return f"{name} would take {saved} time with {_settings(faster.choice, stage)}" if saved.endswith("less") else ""
    least = next((rung for rung in stage.ladder if "least change" in rung.named), fastest)
    ways = f"{name} fits with {_settings(least.choice, stage)}"
    return ways if least is fastest else f"{ways}; the fastest that fits is {_settings(fastest.choice, stage)}"


def _ladder(stage: StagePlan, width: int) -> list[Text]:
    """The rungs as a table: a line of numbers and names, and a line of settings below it."""
    if not stage.ladder:
        return []
    fits, base = stage.prediction.fits, stage.ladder[0].samples_per_second
    if fits and stage.speed:
        base = stage.speed.samples_per_second
    title = f"{'' if fits else 'ways out: '}what fits at effective batch {stage.choice.effective_batch}, fastest first"
    note = (
        f"{_about_pins(stage)}Speeds are estimates, for ranking; 1.00× is {'this plan' if fits else 'the fastest'}. "
        "Below each line stands what to add to the command for it."
    )
    lines = [*paragraph(title, width, 2, "bold"), *paragraph(note, width), Text()]
    shown = [stage.ladder[at] for at in _shown(stage.ladder)]
    lines += _rungs(shown, base, stage, width)
    if len(shown) < len(stage.ladder):
        lines += paragraph(f"{len(stage.ladder) - len(shown):,} more in --json", width, _INDENT, "dim")
    return lines + _searched(stage, width, _INDENT)


def _about_pins(stage: StagePlan) -> str:
    if any(rung.changes for rung in stage.ladder):
        return "Nothing fits with all that the recipe sets, so these replace some of it. "
    return "All keep what the recipe sets. " if any(map(words.is_pinned, stage.reasons.values())) else ""


def _shown(ladder: Sequence[Rung]) -> list[int]:
    """Which rungs are rows: the named ones, those that replace the fewest settings, and a few from all over the rest."""
    shown = {at for at, rung in enumerate(ladder) if rung.named}
    replacing = [at for at, rung in enumerate(ladder) if rung.changes]
    shown.update(sorted(replacing, key=lambda at: len(ladder[at].changes))[:SIMPLEST])
    others, room = [at for at in range(len(ladder)) if at not in shown], max(ROWS - len(shown), 0)
    if len(others) > room:
        others = [others[(2 * row + 1) * len(others) // (2 * room)] for row in range(room)]
    return sorted([*shown, *others])


def _rungs(rungs: Sequence[Rung], base: float, stage: StagePlan, width: int) -> list[Text]:
    rates = [words.number(rung.samples_per_second) for rung in rungs]
    speeds = [words.times(rung.samples_per_second / base) if base > 0 else "" for rung in rungs]
    peaks = [words.needed_bytes(rung.prediction)[1] for rung in rungs]
    batches = [_cut(rung.choice) for rung in rungs]
    widths = [max(map(len, ("samples/s", *rates))), max(map(len, ("speed", *speeds))), size_cells(peaks), 5]
    cells = max(map(len, batches))
    used = min(4 + sum(widths) + cells + 10, width - _LEAST)
    heads = zip(("samples/s", "speed", "reserved", ""), widths, strict=True)
    head = columns([*((name, -wide, "bold") for name, wide in heads), ("micro-batch × accumulation", 0, "bold")])
    lines = [_within(head, width)]
    for rung, rate, speed, peak, batch in zip(rungs, rates, speeds, peaks, batches, strict=True):
        numbers = (rate, speed, size(peak), percent(peak, rung.prediction.usable_bytes))
        row = [(text, -wide, "") for text, wide in zip(numbers, widths, strict=True)]
        first, *rest = wrap(_marks(rung, stage), width - used)
        lines.append(_within(columns([*row, (batch, -cells, ""), (first, 0, "bold green")]), width))
        lines += [Text(" " * used).append(line, "bold green") for line in rest]
        if rung.choice != stage.choice:
            lines += hanging(_settings(rung.choice, stage), width, _INDENT)
    return lines


def _marks(rung: Rung, stage: StagePlan) -> str:
    marks = [clean(name) for name in rung.named] + (["this plan"] if rung.choice == stage.choice else [])
    return ", ".join(map(kept, [*marks, *(["ragged"] if words.is_ragged(rung.choice) else [])]))


def _searched(stage: StagePlan, width: int, indent: int) -> list[Text]:
    search = stage.search
    if search is None:
        return []
    found = (
        f"searched: {words.counted(search.considered, 'configuration')}; {search.dominated:,} beaten by another one at any "
        f"size, {search.bounded:,} ruled out by a bound, {search.replayed:,} replayed through the allocator"
    )
    return hanging(found, width, indent, "dim")


def _named(stage: StagePlan, width: int) -> list[Text]:
    """The rungs with names, in sentences. What was said of one is not said again of the next."""
    lines: list[Text] = []
    said: set[str] = set()
    for rung in stage.ladder:
        if rung.named and rung.choice != stage.choice:
            lines += [Text(), *_told(", ".join(rung.named), rung, stage, width, said)]
    return lines[1:]


def _told(title: str, rung: Rung, stage: StagePlan, width: int, said: set[str]) -> list[Text]:
    """What a rung changes, why it fits, what it costs in time and what is exact about it; `said` grows by the sentences."""
    exact = f"{'exact' if rung.exact else 'not exact'}: {clean(rung.exactness)}"
    sentences = [*_changed(rung, stage, said), f"{words.verdict(rung.prediction)}{_falls(rung, stage)}", _time(rung, stage)]
    sentences.append(f"{exact.partition(':')[0]}, as above" if exact in said else exact)
    said.add(exact)
    lines = paragraph(clean(title), width, 2, "bold")
    return lines + [line for sentence in sentences for line in hanging(sentence, width)]


def _changed(rung: Rung, stage: StagePlan, said: set[str]) -> list[str]:
    """A sentence for each setting of the recipe that is replaced, and one for what was left to the planner."""
    changes = {name: f"{words.label(name)} {clean(change)}" for name, change in rung.changes.items()}
    again = [words.label(name) for name, sentence in changes.items() if sentence in said]
    found = [sentence for sentence in changes.values() if sentence not in said]
    said.update(found)
    names = [setting.partition("=")[0] for setting in words.settings(rung.choice, stage.choice)]
    free = [kept(words.knob(name, getattr(rung.choice, name))) for name in names if name not in rung.changes]
    found += [f"as above: {', '.join(again)}"] if again else []
    return [*found, *([f"left to the planner: {', '.join(free)}"] if free else [])]


def _falls(rung: Rung, stage: StagePlan) -> str:
    """What makes the difference: the roles that take less than in the plan's own choice, the most first."""
    before, after = stage.prediction.by_role, rung.prediction.by_role
    least = _FALL * rung.prediction.usable_bytes
    falls = {role: nbytes - after.get(role, 0) for role, nbytes in before.items() if nbytes - after.get(role, 0) > least}
    told = [
        f"{words.roles(role)} fall from {kept(size(before[role]))} to {kept(size(after[role])) if after.get(role) else 'none'}"
        for role in sorted(falls, key=lambda role: -falls[role])[:_FALLS]
    ]
    return f"; {' and '.join(told)}" if told else ""


def _time(rung: Rung, stage: StagePlan) -> str:
    shares = [share for share in words.time_shares(rung) if not share.startswith("compute")]
    spent = f"; {', '.join(shares)} of it" if shares else ""
    saved = _saved(rung, stage)
    against = f", {saved} than {'in this plan' if stage.prediction.fits else 'as asked, if that fitted'}" if saved else ""
    return f"{words.seconds(rung.step_seconds)} a step{against}{spent}"


def _saved(speed: Speed, stage: StagePlan) -> str:
    """The time of a step against the plan's own, ``22 % less``; nothing where they take the same or it is not known."""
    own = stage.speed.step_seconds if stage.speed else 0.0
    change = speed.step_seconds / own - 1 if own > 0 else 0.0
    if abs(change) < 0.005:
        return ""
    return f"{100 * abs(change):,.0f} % {'less' if change < 0 else 'more'}"


def _unpinned(stage: StagePlan, width: int) -> list[Text]:
    """The fastest configuration that replaces settings of the recipe, where that would be faster."""
    rung = stage.unpinned
    if rung is None:
        return []
    title, *sentences = _told("faster, if settings of the recipe were replaced", rung, stage, width, set())
    return [title, *hanging(_settings(rung.choice, stage), width), *sentences]


def _nearest(stage: StagePlan, width: int) -> list[Text]:
    """What lacks least, where nothing fits."""
    rung = stage.nearest
    if rung is None or stage.ladder:
        return []
    title = f"no configuration fits at effective batch {stage.choice.effective_batch}; the nearest {_lack(rung.prediction)}"
    lines = [*paragraph(title, width, 2, "bold red"), *hanging(_settings(rung.choice, stage), width, 4)]
    request = rung.prediction.failing_request
    if request and rung.choice != stage.choice:
        nearest = replace(stage, choice=rung.choice, prediction=rung.prediction)
        lines += paragraph(words.failure(nearest, request), width, 4)
    return lines + _searched(stage, width, 4)


def _lack(prediction: Prediction) -> str:
    """What is missing for a choice that does not fit."""
    missing = -words.left_bytes(prediction)
    if missing > 0:
        return f"lacks {kept(size(missing))} at least"
    return "has enough memory, but in pieces that are too small"


def _suggestions(stage: StagePlan, width: int) -> list[Text]:
    """What changes the mathematics, with what it would save."""
    if not stage.suggestions:
        return []
    cells = size_cells(nbytes for item in stage.suggestions for nbytes in (item.saves_bytes, item.allocated_peak_bytes))
    lines = paragraph("other mathematics, only suggested", width, 2, "bold")
    lines.append(columns([("saves", -cells, "bold"), ("allocated", -cells, "bold"), ("fits", 4, "bold")]))
    for item in stage.suggestions:
        used = 4 + 2 * cells + 10
        first, *rest = wrap(f"{clean(item.change)} ({clean(item.basis)})", width - used)
        verdict = ("yes", 4, "green") if item.fits else ("no", 4, "red")
        numbers = [(size(nbytes), -cells, "") for nbytes in (item.saves_bytes, item.allocated_peak_bytes)]
        lines.append(columns([*numbers, verdict, (first, 0, "")]))
        lines += [Text(" " * used + line) for line in rest]
    return lines


def _fit(stage: StagePlan, width: int) -> list[Text]:
    """The cards that the stage fits on, and the limits of the one that was asked for."""
    if stage.fit is None:
        return []
    lines = paragraph("what it would take: the smallest card for each number of GPUs", width, 2, "bold")
    lines += _cards(stage.fit.cards, stage, width)
    return lines + ([Text(), *field("at most", map(_limit, stage.fit.limits), width)] if stage.fit.limits else [])


def _cards(cards: Sequence[Card], stage: StagePlan, width: int) -> list[Text]:
    if not cards:
        return paragraph("no card of the catalogue has room, in any number that was tried", width, 4)
    numbers, batches = [f"{count(card.choice.gpus)} ×" for card in cards], [_cut(card.choice) for card in cards]
    gpus, cells = max(map(len, numbers)), max(map(len, batches))
    sizes = size_cells(card.reserved_peak_bytes for card in cards)
    names = [cut(clean(card.gpu), max(width - gpus - sizes - cells - 17, _LEAST)) for card in cards]
    wide = max(map(cell_len, names))
    heads = (("", -gpus, ""), ("", wide, ""), ("reserved", -sizes, "bold"), ("", -5, ""))
    lines = [_within(columns([*heads, ("micro-batch × accumulation", 0, "bold")]), width)]
    for card, number, name, batch in zip(cards, numbers, names, batches, strict=True):
        share = percent(card.reserved_peak_bytes, card.usable_bytes)
        row = ((number, -gpus, ""), (name, wide, "bold"), (size(card.reserved_peak_bytes), -sizes, ""), (share, -5, ""))
        lines.append(_within(columns([*row, (batch, -cells, "")]), width))
        lines += hanging(_settings(card.choice, stage), width, _INDENT)
    return lines


def _limit(limit: Limit) -> str:
    label, unit = words.label(limit.name), clean(limit.unit)
    most = f"{label} {limit.value:,}{'' if unit in label else f' {unit}'}"
    return f"{most}: {clean(limit.beyond)}" if limit.beyond else most


def _within(line: Text, width: int) -> Text:
    line.truncate(width)
    return line


def _cut(choice: Choice) -> str:
    return f"{count(choice.micro_batch)} × {count(choice.accumulation)}"


def _settings(choice: Choice, stage: StagePlan) -> str:
    return " ".join(words.settings(choice, stage.choice)) or "the plan's own settings"
