"""A diagnosis as a terminal screen: what the message says, what was asked for, why it failed, and what helps."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from oomph.diagnosis_records import Candidate, Cause, Cure, Diagnosis, OomMessage
from oomph.report import words
from oomph.report.diagnosis_cures import matched, predicted
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

MESSAGES = 8
"""Other messages that are listed."""

FRAMES = 4
"""Frames of the traceback that are shown, the innermost."""

_STYLES = {"certain": "bold red", "likely": "bold yellow", "possible": "", "unlikely": "dim"}
_REPORTERS = {
    "cuda allocator": "PyTorch's CUDA allocator",
    "cuda runtime": "the CUDA runtime",
    "cublas": "cuBLAS",
    "cudnn": "cuDNN",
    "nccl": "NCCL",
    "hip allocator": "PyTorch's HIP allocator",
    "hip runtime": "the HIP runtime",
    "xpu allocator": "PyTorch's XPU allocator",
    "mps": "PyTorch's MPS allocator",
    "cpu allocator": "an allocator of host memory",
    "linux oom killer": "the Linux kernel or a launcher",
}
_HINT = "With --recipe RECIPE each of these gets a predicted peak and time."


def render(diagnosis: Diagnosis, width: int = 80, color: bool = False) -> str:
    """The diagnosis as text.

    Args:
        diagnosis: what to show.
        width: cells of a line; below 70 it is taken as 70. No line is longer.
        color: whether to add escape codes for colour and weight; the words are the same.
    """
    width = max(width, NARROWEST)
    message = diagnosis.message
    lines = [*paragraph(clean(diagnosis.source), width, 0, "bold"), Text()]
    lines += paragraph(_verdict(diagnosis), width, 2, "bold red")
    lines += [Text(), rule("what the message says", width), Text(), *_said(message, width)]
    lines += _traceback(message, width) + _also(diagnosis, width)
    lines += matched(diagnosis, width)
    lines += [Text(), rule("what was asked for", width), Text(), *_candidates(diagnosis, width)]
    lines += [Text(), rule("why it failed", width)]
    for cause in diagnosis.causes:
        lines += [Text(), *_cause(cause, width)]
    if diagnosis.cures:
        lines += [Text(), rule("what helps", width), Text()]
        if diagnosis.recipe is not None:
            lines += predicted(diagnosis.cures, width)
        else:
            for number, cure in enumerate(diagnosis.cures, 1):
                lines += _cure(number, cure, width)
            lines += [Text(), *paragraph(_HINT, width, 2, "dim")]
    if diagnosis.notes:
        lines += [Text(), rule("notes", width), Text()]
        lines += [line for note in diagnosis.notes for line in hanging(_sentence(note), width, 2)]
    return printed(lines, color)


def _verdict(diagnosis: Diagnosis) -> str:
    """The diagnosis in one or two sentences."""
    message = diagnosis.message
    who = _REPORTERS[message.kind]
    if message.requested_bytes is None:
        said = f"{who[:1].upper()}{who[1:]} found no memory{f' and ended {clean(message.process)}' if message.process else ''}"
    else:
        said = f"{who[:1].upper()}{who[1:]} could not give {kept(size(message.requested_bytes))}"
    when = f" in the {message.phase} phase" if message.phase else ""
    first = diagnosis.candidates[0] if diagnosis.candidates else None
    what = ""
    if first is not None and first.certainty in ("certain", "likely"):
        what = f" It was {_sure(first.certainty)} for {_named(first)}."
    elif first is not None and first.certainty == "unlikely":
        what = " Its size fits many tensors and none in particular."
    elif first is not None:
        what = f" The size fits best to {_named(first)}."
    cause = diagnosis.causes[0] if diagnosis.causes else None
    why = f" Cause: {clean(cause.title)} ({cause.certainty})." if cause is not None else ""
    return f"{said}{when}.{what}{why}"


def _sure(certainty: str) -> str:
    return "certainly" if certainty == "certain" else certainty


def _named(candidate: Candidate) -> str:
    dtype = _dtype(candidate.dtype)
    return f"{clean(candidate.what)} {kept(words.shape(candidate.shape))}{f' in {dtype}' if dtype else ''}"


def _dtype(names: str) -> str:
    return " or ".join(words.dtype(name) for name in names.split(" or ")) if names else ""


def _said(message: OomMessage, width: int) -> list[Text]:
    """What the message says: who, where, when, and its sizes."""
    where = [f"rank {message.rank}"] if message.rank is not None else []
    where += [f"GPU {message.gpu}"] if message.gpu is not None else []
    who = ", ".join([_REPORTERS[message.kind], *where])
    lines = field("reported by", [f"{who}; line {message.line:,} of the text"], width)
    if message.torch:
        lines += field("worded by", [f"PyTorch {message.torch}"], width)
    if message.requested_bytes is not None:
        lines += field("asked for", [_interval(message)], width)
    if message.phase:
        lines += field("phase", [f"{message.phase}: {clean(message.phase_why)}"], width)
    if message.module:
        lines += field("module", [clean(message.module)], width)
    if message.repeats > 1:
        lines += field("said", [f"{message.repeats:,} times with the same numbers"], width)
    return lines + _memory(message, width)


def _interval(message: OomMessage) -> str:
    low, high = message.requested_low, message.requested_high
    asked = size(message.requested_bytes or 0)
    if low is None or high is None:
        return asked
    if low == high:
        return f"{kept(asked)}, {low:,} bytes"
    return f"{kept(asked)} as printed: a request of {kept(f'{low:,}')} to {kept(f'{high:,} bytes')}"


def _memory(message: OomMessage, width: int) -> list[Text]:
    """The sizes of the message as a table with bars."""
    rows = [
        (message.capacity_bytes, "the card"),
        (message.limit_bytes if (message.limit_bytes or 0) < 2**59 else None, "allowed for this process"),
        (message.allocated_bytes, "allocated: tensors hold it"),
        (message.private_pool_bytes, "of it in the pools of CUDA graphs"),
        (message.unallocated_bytes, "unused in the allocator"),
        (message.process_bytes, "this process in all"),
        (message.other_bytes, "other allocations"),
        (message.free_bytes, "free"),
        *((process.bytes, f"process {process.pid}") for process in message.others[:6]),
        (message.requested_bytes, "asked for"),
    ]
    known = [(nbytes, name) for nbytes, name in rows if nbytes is not None]
    if len(known) < 2:
        return []
    whole = message.capacity_bytes or message.limit_bytes or 0
    sizes, bars = size_cells(nbytes for nbytes, _ in known), (width - 40) // 2
    scale = min(max(nbytes for nbytes, _ in known), 2 * whole) if whole else max(nbytes for nbytes, _ in known)
    lines = [Text()]
    for nbytes, name in known:
        style = "red" if name == "asked for" else "cyan"
        shown = [(size(nbytes), -sizes, ""), (percent(nbytes, whole), -5, "dim")]
        shown += [(bar(min(nbytes, scale), scale, bars), bars, style), (shorten(name, width - sizes - bars - 15), 0, "")]
        lines.append(columns(shown))
    return lines


def _traceback(message: OomMessage, width: int) -> list[Text]:
    if not message.frames:
        return []
    shown = message.frames[-FRAMES:]
    left = len(message.frames) - len(shown)
    title = f"traceback, the last {len(shown)} of {len(message.frames)} frames" if left else "traceback"
    lines = [Text(), *paragraph(title, width, 2, "bold")]
    for frame in shown:
        file = frame.file.replace("\\", "/").rpartition("/")[2]
        place = clean(file) + (f", line {frame.line}" if frame.line else "")
        place += f", {clean(frame.function)}" if frame.function else ""
        lines.append(Text("    " + cut(place, width - 4)))
        if frame.code:
            lines.append(Text("      " + cut(clean(frame.code), width - 6), "dim"))
    return lines


def _also(diagnosis: Diagnosis, width: int) -> list[Text]:
    """The other messages of the text, in a line each."""
    others = [message for place, message in enumerate(diagnosis.messages) if place != diagnosis.explained]
    if not others:
        return []
    lines = [Text(), *paragraph("also in the text", width, 2, "bold")]
    for message in others[:MESSAGES]:
        where = f"rank {message.rank}, " if message.rank is not None else ""
        where += f"GPU {message.gpu}, " if message.gpu is not None else ""
        asked = f"{size(message.requested_bytes)} asked for" if message.requested_bytes is not None else ""
        free = f"{size(message.free_bytes)} free" if message.free_bytes is not None else ""
        numbers = ", ".join(part for part in (asked, free) if part) or clean(message.text)
        lines.append(Text("    " + cut(f"line {message.line:,}: {where}{_REPORTERS[message.kind]}: {numbers}", width - 4)))
    if len(others) > MESSAGES:
        lines.append(Text(f"    and {len(others) - MESSAGES} more"))
    return lines


def _candidates(diagnosis: Diagnosis, width: int) -> list[Text]:
    if not diagnosis.candidates:
        return paragraph("The message does not tell which tensor it was.", width)
    lines: list[Text] = []
    told: set[str] = set()
    for candidate in diagnosis.candidates:
        long = candidate.rank == 1 or candidate.certainty != "unlikely"
        lines += [Text()] if long and lines else []
        lines += _candidate(candidate, told, width) if long else hanging(_headline(candidate), width, 2, "dim")
    return lines


def _headline(candidate: Candidate) -> str:
    return f"{candidate.rank}. {_named(candidate)}: {candidate.certainty}"


def _candidate(candidate: Candidate, told: set[str], width: int) -> list[Text]:
    """A candidate with its reasons, but for those that another one above it has given."""
    lines = hanging(_headline(candidate), width, 2, _STYLES[candidate.certainty])
    if len(candidate.shape) > 1:
        lines += hanging(f"({', '.join(map(clean, candidate.symbols))})", width, 5, "dim")
    lines += [line for reason in candidate.why if reason not in told for line in hanging(_sentence(reason), width, 5)]
    models = f"In {_some(candidate.models)}."
    lines += hanging(models, width, 5) if candidate.models and models not in told else []
    told.update(candidate.why, (models,))
    return lines


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(clean(name) for name in names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _cause(cause: Cause, width: int) -> list[Text]:
    lines = hanging(f"{cause.rank}. {clean(cause.title)}: {cause.certainty}", width, 2, _STYLES[cause.certainty])
    return lines + [line for reason in cause.why for line in hanging(_sentence(reason), width, 5)]


def _cure(number: int, cure: Cure, width: int) -> list[Text]:
    exact = "" if cure.exact is None else " The result stays the same." if cure.exact else " It changes what is computed."
    lines = hanging(f"{number}. {_sentence(cure.change)}", width, 2, "bold" if cure.asked else "")
    lines += hanging(f"{_sentence(cure.why)}{exact}", width, 5, "dim")
    predicted = []
    if cure.allocated_peak_bytes is not None:
        predicted.append(f"allocated peak {kept(size(cure.allocated_peak_bytes))}")
    if cure.reserved_peak_bytes is not None:
        predicted.append(f"reserved peak {kept(size(cure.reserved_peak_bytes))}")
    if cure.samples_per_second is not None:
        predicted.append(f"{words.number(cure.samples_per_second)} samples/s")
    if cure.fits is not None:
        predicted.append("fits" if cure.fits else "does not fit")
    return lines + (hanging(f"Predicted: {', '.join(predicted)}.", width, 5) if predicted else [])


def _sentence(text: str) -> str:
    """A text as a sentence: with a capital letter, if it begins with a word, and a full stop."""
    shown = clean(text)
    first = shown.split(" ", 1)[0]
    shown = shown[:1].upper() + shown[1:] if first.isalpha() else shown
    return shown if shown.endswith((".", "!", "?")) else f"{shown}."
