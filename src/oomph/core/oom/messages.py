"""Every report in a text that memory ran out, with its numbers, its rank and its traceback."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from oomph.core.oom.cleaning import Line, clean_lines
from oomph.core.oom.frames import frames_before, module_of, phase_of
from oomph.core.oom.reporters import TRIGGERS, Reported, other_reports
from oomph.core.oom.sizes import LARGEST, ROUND_UP_DIVISIONS, SIZE, Printed, before_rounding, read_size
from oomph.core.oom.untangle import looks_tangled, untangle
from oomph.core.oom.wording import ASKED, device_fields, joined, torch_versions
from oomph.diagnosis_records import OomMessage, Reporter

MOST_MESSAGES = 64
"""Different messages that are kept of one text."""

_WHOLE_TEXT = 2_000_000
_BEFORE, _AFTER = 60_000, 6_000
_MOST_PLACES = 400
_MOST_TANGLED = 40
_MOST_READ = 1_000
_MOST_IN_LINE = 200
_WINDOW_LINES, _WINDOW_LETTERS = 40, 2_400
_FIRST_WORDS = 60
_DEVICE = re.compile(
    rf"(?:(?P<who>CUDA|HIP|XPU|MPS backend) out of memory\b|(?<![a-z] )\bOut of memory\.(?= Tried)"
    rf"|Allocation on device (?:\d{{1,4}}|\w{{1,9}}) would exceed allowed memory"
    r"|(?P<short>Allocation on device)(?=\s*\.?\s*$)"
    rf"|Tried to allocate (?={SIZE})|(?={SIZE} already allocated;)|GPU ?\d{{0,4}} has a total capac"
    rf"|Of the allocated memory (?={SIZE})|(?P<bare>OutOfMemoryError\b)(?=\s*:?\s*$))"
)
_STOP = re.compile(r"\s*(?:Traceback \(most|File [\"']|During handling|The above exception|-{5,}|={5,}|\*{5,})")
_EXABYTE = re.compile(r"Tried to allocate more than 1\s?EB memory")
_REQUESTED = re.compile(rf"Requested\s{{0,16}}:\s?({SIZE})")
_NOISE = re.compile(r"\s{0,20}\d{1,3}%\s?\|")
_KINDS: dict[str, Reporter] = {
    "CUDA": "cuda allocator",
    "HIP": "hip allocator",
    "XPU": "xpu allocator",
    "MPS backend": "mps",
}
_NAMED = re.compile(r"(?:Error|Exception|error)\W{0,4}$|^\W{0,12}$|[:>\]|)\"'`(]\s{0,3}$")


class Found(NamedTuple):
    """The messages of a text, how many more there were, and the settings of the allocator that the text gives."""

    messages: tuple[OomMessage, ...]
    left_out: int
    tangled: bool
    divisions: int


def find_messages(text: str) -> Found:
    """Every different report of a text, in its order. Those that repeat another are counted by it.

    Args:
        text: what a program printed, in any state.
    """
    divisions = ROUND_UP_DIVISIONS.search(text)
    steps = int(divisions[1]) if divisions else 0
    kept: dict[tuple[Any, ...], tuple[int, OomMessage]] = {}
    repeats: Counter[tuple[Any, ...]] = Counter()
    left_out, tangled = 0, False
    for piece, first in _pieces(text):
        lines = [line._replace(number=line.number + first) for line in clean_lines(piece)]
        reader = _Reader(lines, steps)
        for weight, message, was_tangled in reader.reports():
            tangled = tangled or was_tangled
            key = _key(message)
            if key in kept or len(kept) < MOST_MESSAGES:
                kept.setdefault(key, (weight, message))
                repeats[key] += 1
            else:
                left_out += 1
        left_out += reader.left_out
    best = max((weight for weight, _ in kept.values()), default=0)
    strong = [key for key, (weight, _) in kept.items() if weight >= min(best, 2)]
    chosen = tuple(replace(kept[key][1], repeats=repeats[key]) for key in strong)
    return Found(_without_echoes(chosen), left_out, tangled, steps)


def _pieces(text: str) -> list[tuple[str, int]]:
    """The parts of a text that can hold a message with its traceback, each with the number of lines before it."""
    if len(text) <= _WHOLE_TEXT:
        return [(text, 0)]
    low = text.lower()
    places: set[int] = set()
    for trigger in TRIGGERS:
        at = low.find(trigger)
        for _ in range(_MOST_PLACES):
            if at < 0:
                break
            places.add(at)
            at = low.find(trigger, at + len(trigger))
    spans: list[list[int]] = []
    for place in sorted(places):
        start = text.rfind("\n", 0, max(0, place - _BEFORE)) + 1
        end = min(len(text), place + _AFTER)
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    found, number, last = [], 0, 0
    for start, end in spans:
        number += text.count("\n", last, start)
        found.append((text[start:end], number))
        last = start
    return found


class _Reader:
    """Goes through lines once, and reads every report in them.

    A window of lines that comes again is not read again: its message is counted. After `_MOST_READ` different windows the rest
    is left out.
    """

    def __init__(self, lines: Sequence[Line], divisions: int) -> None:
        self._lines, self._divisions = lines, divisions
        self._taken, self._tried, self._read = -1, 0, 0
        self._windows: dict[str, tuple[OomMessage, int, int]] = {}
        self.left_out = 0

    def reports(self) -> Iterator[tuple[int, OomMessage, bool]]:
        """(weight, message, whether it was told apart from another) of every report."""
        for place, line in enumerate(self._lines):
            if self._tried < _MOST_TANGLED and looks_tangled(line.text):
                self._tried += 1
                apart = self._told_apart(place)
                yield from apart
                if apart:
                    continue
            low = line.text.lower()
            if place > self._taken and any(trigger in low for trigger in TRIGGERS):
                yield from self._in_line(place)
            if place > self._taken:
                yield from self._across(place)

    def _in_line(self, place: int) -> Iterator[tuple[int, OomMessage, bool]]:
        text = self._lines[place].text
        matches = itertools.islice(_DEVICE.finditer(text), _MOST_IN_LINE)
        device = [match for match in matches if _counts(text, match)]
        last = -1
        for number, match in enumerate(device):
            if match.start() < last:
                continue
            end = next((other.start() for other in device[number + 1 :] if other["who"]), len(text))
            found = self._device(place, match, min(end, match.start() + 2 * _WINDOW_LETTERS))
            if found is None:
                self.left_out += 1
                continue
            message, taken, letters = found
            last = match.start() + letters
            self._taken = max(self._taken, place + taken - 1)
            yield 3 if message.requested_bytes else 2, message, False
        if not device:
            for report in other_reports(text):
                if self._read >= _MOST_READ:
                    self.left_out += 1
                    continue
                self._read += 1
                yield report.weight, _message(self._lines, place, report), False

    def _across(self, place: int) -> Iterator[tuple[int, OomMessage, bool]]:
        """A message whose first words are cut in two by the end of the line."""
        line = self._lines[place]
        if place + 1 >= len(self._lines) or not line.text or self._lines[place + 1].rank != line.rank:
            return
        tail = line.text[-_FIRST_WORDS:]
        both = tail + self._lines[place + 1].text[:_FIRST_WORDS]
        if "out of memory" not in both and "Tried to alloc" not in both:
            return
        for match in _DEVICE.finditer(both):
            if match.start() < len(tail) < match.end() and _counts(both, match):
                found = self._device(place, match, len(line.text), len(line.text) - len(tail) + match.start())
                if found is not None:
                    self._taken = max(self._taken, place + found[1] - 1)
                    yield 3 if found[0].requested_bytes else 2, found[0], False
                return

    def _device(
        self, place: int, match: re.Match[str], end: int, start: int | None = None
    ) -> tuple[OomMessage, int, int] | None:
        """`_device_message`, from memory where the same lines were read before; None where too much was read."""
        start = match.start() if start is None else start
        window = "\n".join(line.text[: 2 * _WINDOW_LETTERS] for line in self._lines[place : place + _WINDOW_LINES])
        key = f"{start} {end} {window}" if start else window
        if key not in self._windows:
            if self._read >= _MOST_READ:
                return None
            self._read += 1
            self._windows[key] = _device_message(self._lines, place, match, (start, end), self._divisions)
        return self._windows[key]

    def _told_apart(self, place: int) -> list[tuple[int, OomMessage, bool]]:
        """The two messages of a line that two processes wrote at once."""
        found = []
        for text in untangle(self._lines[place].text):
            alone = [*self._lines[:place], self._lines[place]._replace(text=text)]
            match = _DEVICE.search(text)
            if match:
                found.append((3, _device_message(alone, place, match, (match.start(), len(text)), self._divisions)[0], True))
        return found


def _counts(text: str, match: re.Match[str]) -> bool:
    """Whether a device allocator's words are an error and not talk about one."""
    if match["short"] is not None:
        return bool(_NAMED.search(text[max(0, match.start() - 40) : match.start()]))
    if match["who"] is None and match["bare"] is None:
        return True
    after = text[match.end() : match.end() + 60]
    return bool(
        re.match(r"\.?\s{0,4}(?:Tried|\(|$|\.?\s{0,3}GPU)", after)
        or _NAMED.search(text[max(0, match.start() - 40) : match.start()])
    )


def _device_message(
    lines: Sequence[Line], place: int, match: re.Match[str], span: tuple[int, int], divisions: int
) -> tuple[OomMessage, int, int]:
    """The message that begins in a line, how many lines it takes, and how many letters of the first one."""
    line, (start, end) = lines[place], span
    head = line.text[start:end]
    text, fields, lines_taken = joined([head]), device_fields(joined([head])), 1
    if fields["truncated"] and end == len(line.text):
        text, fields, lines_taken = _continued(lines, place, head)
    asked = ASKED.search(text)
    printed = read_size(asked[1]) if asked else None
    low, high = 0, 0
    if printed is None and (requested := _REQUESTED.search(text)):
        printed = read_size(requested[1])
        low, high = (printed.low, printed.high) if printed else (0, 0)
    elif printed is None and _EXABYTE.search(text):
        printed, (low, high) = Printed(2**60, 2**60, LARGEST), (2**60, LARGEST)
        fields["truncated"] = False
    elif printed is not None:
        low, high = before_rounding(printed, divisions)[:2]
    if printed is not None:
        fields |= {"requested_bytes": printed.bytes, "requested_low": max(1, low), "requested_high": max(1, high)}
    kind = _KINDS.get(match["who"] or "", "hip allocator" if "PYTORCH_HIP_ALLOC" in text else "cuda allocator")
    if "MPS allocated" in text or "MPS_HIGH_WATERMARK" in text:
        kind = "mps"
    if kind == "mps" and printed is not None:
        fields |= {"requested_low": max(1, printed.low), "requested_high": max(1, printed.high)}
    versions = (
        torch_versions(text, line.text[max(0, start - 60) : start]) if kind in ("cuda allocator", "hip allocator") else ""
    )
    message = OomMessage(kind, text[:_WINDOW_LETTERS], line.number, line.rank, torch=versions, **fields)
    return _with_frames(message, lines, place), lines_taken, len(head)


def _continued(lines: Sequence[Line], place: int, head: str) -> tuple[str, dict[str, Any], int]:
    """A message that goes on in the next lines, as far as they belong to it."""
    parts, taken, complete = [head], 1, 0
    text, fields = joined(parts), device_fields(joined(parts))
    for offset, line in enumerate(lines[place + 1 : place + _WINDOW_LINES], 1):
        if line.rank != lines[place].rank or _NOISE.match(line.text):
            continue
        if _STOP.match(line.text) or any(match["who"] for match in _DEVICE.finditer(line.text)):
            break
        complete = 0 if line.text.strip() else complete + 1
        if complete > 1 or len(text) > _WINDOW_LETTERS:
            break
        longer = joined([*parts, line.text])
        more = device_fields(longer)
        parts.append(line.text)
        if len(more) > len(fields) or (fields["truncated"] and not more["truncated"]) or _asks_more(text, longer):
            text, fields, taken = longer, more, offset + 1
        if not more["truncated"] and "expandable" not in longer[-200:]:
            following = device_fields(joined([*parts, *[item.text for item in lines[place + offset + 1 : place + offset + 3]]]))
            if following["hints"] == more["hints"]:
                break
    return text, fields, taken


def _asks_more(text: str, longer: str) -> bool:
    return bool(ASKED.search(longer)) and not ASKED.search(text)


def _message(lines: Sequence[Line], place: int, report: Reported) -> OomMessage:
    line = lines[place]
    message = OomMessage(report.kind, line.text[report.start : report.end].strip()[:_WINDOW_LETTERS], line.number, line.rank)
    return _with_frames(replace(message, **report.fields), lines, place)


def _with_frames(message: OomMessage, lines: Sequence[Line], place: int) -> OomMessage:
    frames = frames_before(lines, place, lines[place].rank)
    phase, why = phase_of(frames)
    return replace(message, frames=frames, module=module_of(frames), phase=phase, phase_why=why)


def _key(message: OomMessage) -> tuple[Any, ...]:
    """What makes two messages the same: everything but where they stand and who prints them."""
    numbers = (message.requested_bytes, message.allocated_bytes, message.free_bytes, message.reserved_bytes)
    bare = message.text[:60] if message.requested_bytes is None else ""
    return (message.kind, message.gpu, *numbers, message.process_bytes, message.process, bare)


def _without_echoes(messages: tuple[OomMessage, ...]) -> tuple[OomMessage, ...]:
    """The messages without those that only say again, with less, what another one says in full."""
    whole = {message.kind for message in messages if message.requested_bytes is not None or message.process_bytes is not None}
    return tuple(
        message
        for message in messages
        if message.requested_bytes is not None
        or message.process_bytes is not None
        or message.kind not in whole
        or message.free_bytes is not None
    )
