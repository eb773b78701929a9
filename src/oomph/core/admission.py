"""Admission by prediction: how one step is cut into micro-batches, decided from its own samples before it runs.

Samples are sorted by length, so that those that share a micro-batch pad each other little, and the row is cut where the time
of the whole step is least, among the cuts whose micro-batches are all predicted to fit. The gradient does not depend on it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from oomph.core.layout import Shape


class Cost(Protocol):
    """What a split has to know of a sample."""

    @property
    def tokens(self) -> int:
        """Tokens, those of images included."""
        ...

    @property
    def images(self) -> int:
        """Images that the model sees."""
        ...


class Together(NamedTuple):
    """Samples of a step that have to be in one micro-batch, as one that costs what they do.

    Attributes:
        tokens: of the longest.
        images: of all of them.
        samples: how many there are.
    """

    tokens: int
    images: int
    samples: int


class Split(NamedTuple):
    """A step cut into micro-batches.

    Attributes:
        micro_batches: positions in the step's samples; each sample is in one of them.
        shapes: (samples, padded tokens, images) of each.
        peak_bytes: predicted for each, with all that is resident.
        seconds: estimated for the forwards and backwards of all of them.
    """

    micro_batches: tuple[tuple[int, ...], ...]
    shapes: tuple[Shape, ...]
    peak_bytes: tuple[int, ...]
    seconds: float


class TooLargeError(Exception):
    """A sample that does not fit by itself.

    Attributes:
        position: in the step's samples.
        peak_bytes: predicted with this sample alone.
        limit_bytes: what there is.
    """

    def __init__(self, position: int, peak_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"sample {position} of the step needs {peak_bytes} bytes by itself, and there are {limit_bytes}")
        self.position, self.peak_bytes, self.limit_bytes = position, peak_bytes, limit_bytes


class Admission:
    """Finds splits, and learns from those that ran out of memory all the same.

    After a failure micro-batches at once lose half of what they take above the smallest of the step; nothing whose prediction
    is as high as that of a micro-batch that failed is ever admitted again. Half of the way back is gone each time that
    enough steps in a row ran clean.

    Args:
        peak: predicted bytes of a micro-batch's shape, with all that is resident; not less for more samples or images.
        seconds: estimated time of forward and backward at a shape.
        limit_bytes: what there is.
        grow_after: clean steps before more is tried again.
        peak_of_first: the same as `peak` for the micro-batch that runs first, before there are gradients; by default as `peak`.
        least_rows: micro-batches with fewer tokens, padding included, are padded to as many.
    """

    def __init__(
        self,
        peak: Callable[[Shape], int],
        seconds: Callable[[Shape], float],
        limit_bytes: int,
        grow_after: int = 50,
        *,
        peak_of_first: Callable[[Shape], int] | None = None,
        least_rows: int = 0,
    ) -> None:
        self._peak, self._seconds = functools.lru_cache(1 << 16)(peak), functools.lru_cache(1 << 16)(seconds)
        self._peak_of_first = functools.lru_cache(1 << 16)(peak_of_first) if peak_of_first else self._peak
        self._grow_after, self._least_rows = grow_after, least_rows
        self._ceiling = self._limit = limit_bytes
        self._clean = 0

    @property
    def limit_bytes(self) -> int:
        """What a micro-batch may take now."""
        return self._limit

    def split(self, costs: Sequence[Cost]) -> Split:
        """The fastest split that is predicted to fit. A step without samples has no micro-batches.

        Args:
            costs: of the samples of the step; a `Together` stands for several, and its position for all of theirs.

        Raises:
            TooLargeError: a sample does not fit by itself.
        """
        row = sorted(range(len(costs)), key=lambda at: (-costs[at].tokens, -costs[at].images, at))
        images, samples_to = [0], [0]
        for at in row:
            images.append(images[-1] + costs[at].images)
            samples_to.append(samples_to[-1] + _samples(costs[at]))

        def shape(start: int, end: int) -> Shape:
            samples = samples_to[end] - samples_to[start]
            return Shape(samples, max(costs[row[start]].tokens, -(-self._least_rows // samples)), images[end] - images[start])

        def peak(start: int, end: int) -> int:
            return (self._peak if start else self._peak_of_first)(shape(start, end))

        ends = self._ends(row, peak)
        best: list[tuple[float, int]] = [(math.inf, 0)] * len(row) + [(0.0, 0)]
        for start in reversed(range(len(row))):
            for end in _candidates(start, ends[start]):
                best[start] = min(best[start], (self._seconds(shape(start, end)) + best[end][0], -end))
        bounds = [0]
        while bounds[-1] < len(row):
            bounds.append(-best[bounds[-1]][1])
        pieces = list(itertools.pairwise(bounds))
        shapes = tuple(shape(*piece) for piece in pieces)
        groups = tuple(tuple(sorted(row[start:end])) for start, end in pieces)
        return Split(groups, shapes, tuple(peak(*piece) for piece in pieces), best[0][0])

    def _ends(self, row: Sequence[int], peak: Callable[[int, int], int]) -> list[int]:
        """For each place in the row, where the longest micro-batch that begins there ends."""
        ends: list[int] = []
        end = 0
        for start in range(len(row)):
            end = max(end, start + 1)
            alone = peak(start, start + 1)
            if alone > self._ceiling:
                raise TooLargeError(row[start], alone, self._ceiling)
            while end < len(row) and peak(start, end + 1) <= self._limit:
                end += 1
            while end > start + 1 and peak(start, end) > self._limit:
                end -= 1
            ends.append(end)
        return ends

    def failed(self, split: Split, micro_batch: int) -> None:
        """Memory ran out in one of a split's micro-batches."""
        failed, least = split.peak_bytes[micro_batch], self._peak(_one_of(split.shapes[micro_batch]))
        self._ceiling = min(self._ceiling, failed - 1)
        self._limit = min(self._limit, self._ceiling, least + max(failed - least, 0) // 2)
        self._clean = 0

    def committed(self) -> None:
        """A step ran clean."""
        self._clean += 1
        if self._clean >= self._grow_after and self._limit < self._ceiling:
            self._limit = -(-(self._limit + self._ceiling) // 2)
            self._clean = 0

    def shrink(self) -> None:
        """The next steps take less, though nothing failed: the allocator had to give segments back."""
        self._limit -= self._limit // 16
        self._clean = 0

    def state(self) -> dict[str, int]:
        """What was learnt, for a checkpoint."""
        return {"ceiling": self._ceiling, "limit": self._limit, "clean": self._clean}

    def restore(self, state: dict[str, int]) -> None:
        """Takes over what was learnt, as far as there is room for it."""
        self._ceiling = min(self._ceiling, state["ceiling"])
        self._limit, self._clean = min(self._ceiling, state["limit"]), state["clean"]


def _samples(cost: Cost) -> int:
    return cost.samples if isinstance(cost, Together) else 1


def _one_of(shape: Shape) -> Shape:
    """The shape of one of the samples, with its share of the images."""
    return Shape(1, shape.tokens, -(-shape.images // shape.samples))


def _candidates(start: int, end: int) -> Iterator[int]:
    """Where a micro-batch may end: the longest, and shorter ones ever further apart."""
    length = end - start
    while length:
        yield start + length
        length = min(length - 1, length * 7 // 8)
