"""Memory over the steps, by role, in few points: what is allocated after each of some events, exact at every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oomph.core.allocator import Allocator, AllocatorSettings, Failure, replay
from oomph.core.events import Events, Segment
from oomph.records import Choice, RoleBytes, Timeline, TimelinePart

BUCKETS = 125
"""Stretches of which the most and the least are kept, besides two of every part."""
CLOSER = 3
"""How many times as many of them has the step in which the worst moment is."""

_Ints = npt.NDArray[np.int64]
_DURING = {"load": "load", "warmup": "first step", "step": "later step", "evaluate": "evaluation"}
_WITHIN = {"recompute": "backward"}


class _Stretch(NamedTuple):
    """Events from number `start` on that belong to one phase of one segment; the last one is empty, and begins at the end."""

    start: int
    during: str
    phase: str


class _Run(NamedTuple):
    """A repetition of a segment that ran, and the bytes allocated after each of its events."""

    segment: int
    allocated: Sequence[int]


def timeline(events: Events, choice: Choice, failure: Failure | None) -> Timeline:
    """The timeline of one rank on a card that has room for everything.

    Args:
        events: the rank's events, as `layout.lay_out` gives them.
        choice: for the allocator's settings.
        failure: the first request that the card cannot serve.
    """
    runs: list[_Run] = []
    allocator = Allocator(settings=AllocatorSettings(expandable_segments=choice.expandable_segments))
    replay(
        events.sizes,
        events.segments,
        allocator,
        streams=events.streams,
        watch=lambda index, trail: runs.append(_Run(index, trail.allocated)),
    )
    return _timeline(events, runs, None if failure is None else _number(runs, failure))


def live_timeline(events: Events, limit_bytes: int) -> Timeline:
    """The timeline of a device without a caching allocator: the bytes of the storages alive, not rounded.

    Args:
        events: of one rank.
        limit_bytes: what the storages may take.
    """
    runs, alive = [], 0
    for index, segment in enumerate(events.segments):
        levels = []
        for entry in segment.timeline:
            alive += events.sizes[entry] if entry >= 0 else -events.sizes[~entry]
            levels.append(alive)
        runs.append(_Run(index, levels))
    over = (number for number, level in enumerate(level for run in runs for level in run.allocated) if level > limit_bytes)
    return _timeline(events, runs, next(over, None))


def _number(runs: Sequence[_Run], failure: Failure) -> int:
    """The number of the event that fails, counted over all events that ran."""
    start = repetition = 0
    for run in runs:
        if (run.segment, repetition) == (failure.segment, failure.repetition):
            break
        start += len(run.allocated)
        repetition += run.segment == failure.segment
    return start + failure.position


def _timeline(events: Events, runs: Sequence[_Run], fails: int | None) -> Timeline:
    entries = np.concatenate([np.asarray(events.segments[run.segment].timeline, np.int64) for run in runs])
    allocated = np.concatenate([np.asarray(run.allocated, np.int64) for run in runs])
    stretches = list(_stretches(events.segments, runs))
    parts = _parts(stretches)
    peak = int(allocated.argmax())
    worst = peak if fails is None else fails
    extremes = {peak, *_extremes(allocated, parts, worst), *_phase_peaks(allocated, stretches)}
    points = sorted({0, len(allocated) - 1, *extremes, *([] if fails is None else [max(fails - 1, 0), fails])})
    return Timeline(
        events=tuple(points),
        total_events=len(allocated),
        allocated_bytes=tuple(allocated[points].tolist()),
        by_role=_by_role(events, entries, allocated, points),
        parts=parts,
        peak=points.index(peak),
        fails=None if fails is None else points.index(fails),
    )


def _by_role(events: Events, entries: _Ints, allocated: _Ints, points: list[int]) -> tuple[RoleBytes, ...]:
    """Each event changes what its storage's role has, by as much as all of what is allocated."""
    numbers: dict[str, int] = {}
    of_storage = np.array([numbers.setdefault(kind.role, len(numbers)) for kind in events.kinds], np.int64)
    role = of_storage[np.where(entries >= 0, entries, ~entries)]
    change = np.diff(allocated, prepend=0)
    sums = ((name, np.cumsum(np.where(role == number, change, 0))[points]) for name, number in numbers.items())
    return tuple(RoleBytes(name, tuple(line.tolist())) for name, line in sums if line.any())


def _stretches(segments: Sequence[Segment], runs: Sequence[_Run]) -> Iterator[_Stretch]:
    start, phase = 0, "load"
    for run in runs:
        segment = segments[run.segment]
        during = _DURING.get(segment.name.partition("/")[0], segment.name)
        for position, entered in [(0, phase), *sorted(segment.marks)]:
            yield _Stretch(start + position, during, phase := entered)
        start += len(run.allocated)
    yield _Stretch(start, "", "")


def _parts(stretches: Sequence[_Stretch]) -> tuple[TimelinePart, ...]:
    """The stretches without those that are empty, one part for neighbours of one name."""
    parts: list[TimelinePart] = []
    for stretch, after in pairwise(stretches):
        part = TimelinePart(stretch.during, _WITHIN.get(stretch.phase, stretch.phase), stretch.start)
        goes_on = bool(parts) and (parts[-1].during, parts[-1].phase) == (part.during, part.phase)
        if after.start > stretch.start and not goes_on:
            parts.append(part)
    return tuple(parts)


def _extremes(allocated: _Ints, parts: Sequence[TimelinePart], worst: int) -> Iterator[int]:
    """The numbers of the most and the least allocated of about `BUCKETS` stretches, none of which lies in two parts."""
    close = [part.during for part in parts if part.start <= worst][-1]
    ends = [*(part.start for part in parts[1:]), len(allocated)]
    spans = [(part.start, end, CLOSER if part.during == close else 1) for part, end in zip(parts, ends, strict=True)]
    whole = sum(weight * (end - start) for start, end, weight in spans)
    for start, end, weight in spans:
        buckets = 2 + BUCKETS * weight * (end - start) // whole
        edges = np.linspace(start, end, min(buckets, end - start) + 1).astype(int).tolist()
        for first, last in pairwise(edges):
            yield first + int(allocated[first:last].argmax())
            yield first + int(allocated[first:last].argmin())


def _phase_peaks(allocated: _Ints, stretches: Sequence[_Stretch]) -> Iterator[int]:
    """The number of the most allocated of each phase, which begins with what the one before it left."""
    found: dict[str, int] = {}
    for stretch, stop in pairwise(stretches):
        first = max(stretch.start - 1, 0)
        if first < stop.start:
            number = first + int(allocated[first : stop.start].argmax())
            if allocated[number] > allocated[found.get(stretch.phase, number)] or stretch.phase not in found:
                found[stretch.phase] = number
    yield from found.values()
