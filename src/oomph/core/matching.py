"""Which request of a stage's step an out-of-memory message is about, and which sample length makes it.

The size in a message is that of the segment that the allocator wanted (``get_allocation_size`` of
``c10/cuda/CUDACachingAllocator.cpp``), printed with two decimals. Every size of the step is a formula in the shape of the
micro-batch, so the token counts at which some request prints as the message does follow from bisection. At each of them the
step is laid out, and what is in use before the request is compared with what the message says.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from oomph.core.allocator import Allocator, AllocatorSettings, live_at, replay
from oomph.core.closed_form import LEAST_ROWS, ClosedForm, Formula
from oomph.core.events import Events, Segment
from oomph.core.kernel_sizes import SIZES
from oomph.core.layout import Shape, lay_out
from oomph.core.reserve import (
    LARGE_ROUNDING,
    LARGE_SEGMENT,
    MIN_LARGE_REQUEST,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    rounded,
)
from oomph.core.stage import StageModel
from oomph.diagnosis_records import OomMessage
from oomph.records import Choice, FailingRequest

NEAR = 0.15
"""The share by which what is in use may differ from the message where a request still counts as the one."""

_MOST_LAYOUTS = 13
_NARROW = 8
_STEPS = 5
_LATER = 0.05
"""What it costs a request that some request before it in the same micro-batch needed more memory than it does."""
_OTHER_PHASE = 0.10
_RECOMPUTED = 0.03
_SMALLER_CUT = 0.01
_RARE_CUT = 0.05
_FULL = 0.02
"""What it counts in favour of the longest sample: where texts are cut to a limit, many are as long as it."""
_NAMED = 0.02
_ALIKE = 0.005
_SAME_MOMENT = 0.02
_CACHING = ("cuda allocator", "hip allocator", "xpu allocator")
_PHASES = {"evaluation": "evaluate"}

Numbers = npt.NDArray[np.int64]


class Match(NamedTuple):
    """A request of the step that the message may be about.

    Attributes:
        shape: of the micro-batch.
        choice: the knobs, with that micro-batch.
        events: of the step at that shape.
        segment: the part of the step, by its place in `events.segments`.
        position: of the request in the segment's timeline.
        in_use: bytes in use before it.
        needed: bytes that some request before it in the same part of the step needed more than it does.
        cost: how unlike the message it is: the share by which `in_use` differs, and more where the moment does not fit.
        span: the fewest and the most tokens at which the request prints as the message does.
        moments: the parts of the step in which the same request is about as like the message.
    """

    shape: Shape
    choice: Choice
    events: Events
    segment: int
    position: int
    in_use: int
    needed: int
    cost: float
    span: tuple[int, int] = (0, 0)
    moments: tuple[str, ...] = ()

    @property
    def storage(self) -> int:
        """What is asked for."""
        return self.events.segments[self.segment].timeline[self.position]

    def event(self, usable: int) -> FailingRequest:
        """The request as a record, with what is predicted to be in use and reserved then, of so many usable bytes."""
        settings = AllocatorSettings(expandable_segments=self.choice.expandable_segments)
        last = self.events.segments[self.segment]
        until = [*self.events.segments[: self.segment], Segment(last.name, last.timeline[: self.position], ())]
        allocator = Allocator(capacity_bytes=usable, settings=settings)
        done = replay(self.events.sizes, until, allocator, streams=self.events.streams)
        in_use, reserved = (done.allocated, done.reserved) if done.failure is None else (self.in_use, usable)
        return FailingRequest(**vars(self.events.request(self.storage)), in_use_bytes=in_use, reserved_bytes=reserved)

    def alive(self) -> dict[int, int]:
        """The storages in use before the request, with their bytes."""
        storages = live_at(self.events.segments, self.segment, self.position - 1)
        return {storage: rounded(self.events.sizes[storage]) for storage in storages}


class Missed(NamedTuple):
    """The request that comes nearest to the size in a message that none has."""

    event: FailingRequest
    shape: Shape


def best_match(model: StageModel, choice: Choice, message: OomMessage) -> Match | None:
    """The request of the stage that is most like the message's; none where no request prints so at any sample length.

    Args:
        model: the stage on its card.
        choice: the configuration that was run; micro-batches below its own are looked at too, as the last of an epoch is.
        message: with the size that was asked for.
    """
    search = _Search(model, choice, message)
    found = [match for shape in search.shapes() for match in search.at(shape)]
    if not found:
        return None
    least = min(match.cost for match in found)
    alike = [match for match in found if match.cost <= least + _ALIKE]
    return search.refined(max(alike, key=lambda match: (match.shape.samples, match.shape.tokens, -match.cost)))


def nearest(model: StageModel, choice: Choice, message: OomMessage) -> Missed:
    """The request of the longest samples whose size comes nearest to that of the message."""
    shape = Shape(choice.micro_batch, model.tokens, choice.micro_batch * model.images)
    events = model.lay_out(choice).events
    asked = message.requested_bytes or 0
    storage = min(range(len(events.sizes)), key=lambda number: abs(events.sizes[number] - asked))
    event = FailingRequest(**vars(events.request(storage)), in_use_bytes=0, reserved_bytes=0)
    return Missed(event, shape)


class _Search:
    def __init__(self, model: StageModel, choice: Choice, message: OomMessage) -> None:
        self.model, self.choice, self.message = model, choice, message
        self.low, self.high = message.requested_low or 0, message.requested_high or 0
        self.intervals = list(_intervals(message.kind, self.low, self.high))
        self.tokens = model.tokens
        traced = model.lay_out(choice).traced
        self.least = min(max(2, model.images * traced.image_tokens + 1), self.tokens)

    # Shapes.

    def shapes(self) -> list[Shape]:
        """The shapes worth a layout: the longest samples, and those whose step peaks nearest to what was in use then."""
        whole = self.choice.micro_batch
        longest = Shape(whole, self.tokens, whole * self.model.images)
        found: dict[Shape, float] = {}
        for samples in [whole, *range(whole - 1, 1, -1)]:
            form = self._general(samples)
            if form is not None:
                for tokens in self._token_counts(form, samples):
                    shape = Shape(samples, tokens, samples * self.model.images)
                    found.setdefault(shape, self._off(form, shape))
        ranked = sorted((shape for shape in found if shape != longest), key=lambda shape: (found[shape], -shape.tokens))
        return [longest, *ranked[:_MOST_LAYOUTS]]

    def _off(self, form: ClosedForm, shape: Shape) -> float:
        """How far the peak of a shape's step lies from what was in use and asked for, about: sharding takes as much at any.

        A smaller micro-batch than the recipe's counts as further away, as it is rare.
        """
        reported = self.message.allocated_bytes
        if reported is None:
            return 0.0
        peak = form.live_peak(shape, self.choice.accumulation > 1) + self._sharded
        rare = _RARE_CUT * (self.choice.micro_batch - shape.samples) * reported
        return abs(peak - reported - self.low) + rare

    @functools.cached_property
    def _sharded(self) -> int:
        """What the sharding adds to the peak of the longest samples, or takes from it."""
        shape = Shape(self.choice.micro_batch, self.tokens, self.choice.micro_batch * self.model.images)
        form = self.model.form(self.choice, shape)
        level = self._levels(self.model.lay_out(self.choice).events)
        return max(int(after.max(initial=0)) for after, _ in level) - form.live_peak(shape, self.choice.accumulation > 1)

    def _token_counts(self, form: ClosedForm, samples: int) -> set[int]:
        """Token counts to look at: the ends of each span, and some between, one of them near what was in use."""
        counts: set[int] = set()
        for first, last in dict.fromkeys(self._spans(form, samples)):
            counts |= {first, last}
            if last - first >= _NARROW:
                counts |= {last - (last - first) * step // _STEPS for step in range(1, _STEPS)}
                counts.add(self._near_peak(form, samples, first, last))
        return {tokens for tokens in counts if not self._is_special(form, samples, tokens)}

    def _near_peak(self, form: ClosedForm, samples: int, first: int, last: int) -> int:
        """The token count of a span whose step peaks nearest to what was in use and asked for; an odd one."""
        target = (self.message.allocated_bytes or 0) + self.low - self._sharded
        accumulates = self.choice.accumulation > 1
        found = _first(first, last, lambda n: form.live_peak((samples, n, samples * self.model.images), accumulates), target)
        return found - (found % 2 == 0 and found > first)

    def _general(self, samples: int) -> ClosedForm | None:
        """The form of the shape's family; none where each shape has to be traced by itself."""
        tokens = self.tokens - 1 if self.tokens % 8 == 0 and self.tokens > self.least else self.tokens
        shape = Shape(samples, tokens, samples * self.model.images)
        if not self.model.has_formulas(self.choice, shape) or samples * tokens < LEAST_ROWS:
            return None
        return self.model.form(self.choice, shape)

    def _is_special(self, form: ClosedForm, samples: int, tokens: int) -> bool:
        """Whether a shape would have to be traced by itself."""
        if tokens == self.tokens and samples == self.choice.micro_batch:
            return False
        return (form.chunks and samples * tokens < LEAST_ROWS) or (form.pads_masks and tokens % 8 == 0)

    def _spans(self, form: ClosedForm, samples: int) -> Iterator[tuple[int, int]]:
        """For each formula that can: the fewest and the most tokens at which it prints as the message does."""
        at: dict[int, list[int]] = {}

        def size(formula: Formula, tokens: int) -> int:
            if tokens not in at:
                at[tokens] = self._features(form, samples, tokens)
            return _bytes(formula, at[tokens])

        for formula in form.formulas:
            least, most = size(formula, self.least), size(formula, self.tokens)
            for low, high in self.intervals:
                if least <= high and most >= low:
                    span = self._span(functools.partial(size, formula), low, high)
                    if span[0] <= span[1]:
                        yield span

    def _span(self, size: Callable[[int], int], low: int, high: int) -> tuple[int, int]:
        """The fewest and the most tokens at which a growing size lies in an interval."""
        first = _first(self.least, self.tokens, size, low)
        return first, _first(first, self.tokens + 1, size, high + 1) - 1

    def _features(self, form: ClosedForm, samples: int, tokens: int) -> list[int]:
        return form.features((samples, tokens, samples * self.model.images))

    def span_of(self, match: Match) -> tuple[int, int]:
        """The fewest and the most tokens at which the request prints as the message does.

        A sharding makes tensors of its own, whose sizes do not depend on the samples.
        """
        samples, tokens, _ = match.shape
        form = self._general(samples)
        if form is None:
            return tokens, tokens
        if match.storage < len(form.formula):
            formula = form.formulas[form.formula[match.storage]]
            if _bytes(formula, self._features(form, samples, tokens)) == match.events.sizes[match.storage]:
                nbytes = match.events.sizes[match.storage]
                low, high = next(interval for interval in self.intervals if interval[0] <= nbytes <= interval[1])
                return self._span(lambda count: _bytes(formula, self._features(form, samples, count)), low, high)
        return self.least, self.tokens

    # Requests.

    def at(self, shape: Shape) -> Iterator[Match]:
        """The requests of a shape's step that print as the message does."""
        choice = replace(self.choice, micro_batch=shape.samples)
        events = self._events(choice, shape)
        hits = np.array([self._prints_so(size) for size in events.sizes], dtype=bool)
        for number, (after, timeline) in enumerate(self._levels(events)):
            births = timeline >= 0
            storages = np.where(births, timeline, ~timeline)
            most = np.concatenate([[0], np.maximum.accumulate(after)[:-1]]) if len(after) else after
            for position in np.flatnonzero(births & hits[storages]).tolist():
                storage = int(storages[position])
                in_use = int(after[position]) - rounded(events.sizes[storage])
                needed = max(0, int(most[position]) - int(after[position]))
                cost = self._cost(events, storage, in_use, needed, shape)
                yield Match(shape, choice, events, number, position, in_use, needed, cost)

    @staticmethod
    def _levels(events: Events) -> Iterator[tuple[Numbers, Numbers]]:
        """Of each part of the step: the bytes in use after every event, and the events."""
        sizes = np.array([rounded(size) for size in events.sizes], dtype=np.int64)
        level = 0
        for segment in events.segments:
            timeline = np.array(segment.timeline, dtype=np.int64)
            storages = np.where(timeline >= 0, timeline, ~timeline)
            after = level + np.where(timeline >= 0, sizes[storages], -sizes[storages]).cumsum()
            yield after, timeline
            level = int(after[-1]) if len(after) else level

    def _events(self, choice: Choice, shape: Shape) -> Events:
        if shape.tokens == self.tokens:
            return self.model.lay_out(choice).events
        form = self.model.form(choice, shape)
        without = replace(choice, eval_batch=None)
        return lay_out(form, without, shape.tokens, self.model.images)

    def _prints_so(self, size: int) -> bool:
        return any(low <= size <= high for low, high in self.intervals)

    def _cost(self, events: Events, storage: int, in_use: int, needed: int, shape: Shape) -> float:
        reported, kind = self.message.allocated_bytes, events.kinds[storage]
        if reported is None:
            usable = self.model.usable_bytes(self.choice)
            cost = max(0.0, 1 - (in_use + events.sizes[storage]) / usable)
        else:
            cost = abs(in_use - reported) / max(reported, 1)
        cost += _LATER + needed / max(in_use, 1) if needed else 0
        said = _PHASES.get(self.message.phase, self.message.phase)
        if said and said != kind.phase:
            cost += _RECOMPUTED if {said, kind.phase} == {"recompute", "backward"} else _OTHER_PHASE
        bare = kind.op.partition(".")[2].partition(".")[0].strip("_").partition("_backward")[0]
        code = " ".join(frame.code for frame in self.message.frames[-3:])
        cost -= _NAMED if len(bare) > 2 and bare in code else 0
        cost -= _FULL if shape.tokens == self.tokens else 0
        return cost + _SMALLER_CUT * (self.choice.micro_batch - shape.samples)

    def refined(self, match: Match) -> Match:
        """The same request at the token count at which what is in use comes nearest to the message, and all its moments."""
        first, last = span = self.span_of(match)
        reported, best = self.message.allocated_bytes, match
        while reported is not None and last - first >= _NARROW:
            middle = (first + last) // 2
            shape = match.shape._replace(tokens=middle + (middle % 8 == 0))
            if shape.samples * shape.tokens < LEAST_ROWS:
                break
            same = next((other for other in self.at(shape) if _place(other) == _place(match)), None)
            if same is None:
                break
            best = min(best, same, key=lambda other: other.cost)
            first, last = (shape.tokens, last) if same.in_use < reported else (first, shape.tokens)
        return best._replace(span=span, moments=tuple(self._moments(best)))

    def _moments(self, match: Match) -> Iterator[str]:
        kind, layer = match.events.kinds[match.storage], match.events.layers[match.storage]
        for other in self.at(match.shape):
            same = other.events.kinds[other.storage] == kind and other.events.layers[other.storage] == layer
            if same and other.cost <= match.cost + _SAME_MOMENT:
                yield other.events.segments[other.segment].name


def _place(match: Match) -> tuple[int, int]:
    return match.segment, match.storage


def _bytes(formula: Formula, values: list[int]) -> int:
    """A formula's bytes, from the features of a shape."""
    dimensions = [values[d.feature] * d.factor + d.offset for d in formula.dimensions]
    if formula.size:
        return SIZES[formula.size](*dimensions)
    product = formula.itemsize
    for dimension in dimensions:
        product *= dimension
    return product


def _intervals(kind: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The sizes of tensors that a message prints as a size from `low` to `high`, both included.

    PyTorch's caching allocator prints the segment: 2 MiB for a tensor of up to 1 MiB, 20 MiB for one below 10 MiB, the next
    multiple of 2 MiB for a larger one. Others print the request itself.
    """
    if kind not in _CACHING:
        yield max(low, 1), high
        return
    if low <= SMALL_SEGMENT <= high:
        yield 1, SMALL_REQUEST
    if low <= LARGE_SEGMENT <= high:
        yield SMALL_REQUEST + 1, MIN_LARGE_REQUEST - 1
    first, last = -(-low // LARGE_ROUNDING), high // LARGE_ROUNDING
    if first <= last and last * LARGE_ROUNDING >= MIN_LARGE_REQUEST:
        yield max(MIN_LARGE_REQUEST, (first - 1) * LARGE_ROUNDING + 1), last * LARGE_ROUNDING


def _first(low: int, high: int, size: Callable[[int], int], limit: int) -> int:
    """The least number from `low` on at which a growing size has reached a limit; `high` where it does not."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) >= limit else (middle + 1, high)
    return low


def in_roles(events: Events, alive: dict[int, int]) -> dict[str, int]:
    """Bytes by role, the most first."""
    return _sums((events.kinds[storage].role, nbytes) for storage, nbytes in alive.items())


def _sums(parts: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, nbytes in parts:
        sums[name] = sums.get(name, 0) + nbytes
    return dict(sorted(sums.items(), key=lambda item: -item[1]))
