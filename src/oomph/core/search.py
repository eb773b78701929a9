"""Finds configurations that fit among thousands: bounds drop most of them, and a replay decides about the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from oomph.core.predict import Lack
from oomph.records import Choice, Prediction, Speed

FOREIGN = 0.03
"""The share by which a configuration has to be faster to be worth another engine than PyTorch's own."""
STEP = 0.05
"""The share by which the memory of a rung lies below that of the one before."""
ALIKE = 0.005
"""Estimated times that differ by less than this share are taken as equal; then the smaller change wins."""
APART = 0.01
"""The share by which the time of a rung lies below that of the next, for which it takes more memory."""


class Judge(Protocol):
    """What a search asks about a choice."""

    def bound(self, choice: Choice) -> int:
        """Bytes that it has allocated at its peak, at the least."""
        ...

    def usable_bytes(self, choice: Choice) -> int:
        """What the allocator may reserve."""
        ...

    def lack(self, choice: Choice, sure: bool) -> Lack | None:
        """What the card lacks in a replay of the choice, with room for the error bound if `sure`; None where it succeeds."""
        ...

    def predict(self, choice: Choice) -> Prediction:
        """What the choice needs."""
        ...

    def speed(self, choice: Choice) -> Speed:
        """How fast it is."""
        ...


class Searcher:
    """Walks through choices, and counts what it did.

    Args:
        judge: answers about a choice.
        changes: how many settings a choice changes; the fewest win among equals.

    Attributes:
        replayed: choices that were replayed.
    """

    def __init__(self, judge: Judge, changes: Callable[[Choice], int]) -> None:
        self._judge, self._changes = judge, changes
        self._lacks: dict[Choice, Lack | None] = {}
        self._above: dict[tuple[object, ...], int] = {}
        self._bounded: set[Choice] = set()
        self.replayed: set[Choice] = set()

    @property
    def bounded(self) -> set[Choice]:
        """Choices that a bound dropped, and that were not replayed for another reason."""
        return self._bounded - self.replayed

    def frontier(self, choices: Iterable[Choice]) -> list[Choice]:
        """The choices that fit and that no other one beats in both time and memory, fastest first.

        From one to the next, allocated memory falls by at least `STEP`, and time rises by at least `APART`.
        """
        found: list[Choice] = []
        least = math.inf
        for choice in self._in_order(choices):
            plain = replace(choice, expandable_segments=False)
            if choice != plain and self._lacks.get(plain, "bytes") is None:
                continue
            if self._expected(choice) >= (1 - STEP) * least:
                self._bounded.add(choice)
            elif self.fits(choice):
                allocated = self._judge.predict(choice).allocated_peak_bytes
                self._learn(choice, allocated)
                if allocated < (1 - STEP) * least:
                    found.append(choice)
                    least = allocated
        return self._apart(found)

    def _apart(self, choices: Sequence[Choice]) -> list[Choice]:
        """Of choices with rising time and falling memory, those that are noticeably faster than the next one."""
        kept: list[Choice] = []
        for choice in reversed(choices):
            if not kept or self._seconds(choice) < (1 - APART) * self._seconds(kept[-1]):
                kept.append(choice)
        return kept[::-1]

    def _seconds(self, choice: Choice) -> float:
        return self._judge.speed(choice).step_seconds

    def _expected(self, choice: Choice) -> int:
        """Bytes that a choice is expected to need: its bound, and what others of its kind were above theirs at the least.

        That decides which rungs are worth a replay, and never whether a choice fits.
        """
        return self._judge.bound(choice) + self._above.get(_kind(choice), 0)

    def _learn(self, choice: Choice, allocated: int) -> None:
        above = allocated - self._judge.bound(choice)
        self._above[_kind(choice)] = min(above, self._above.get(_kind(choice), above))

    def fastest(self, choices: Iterable[Choice]) -> Choice | None:
        """The fastest choice that fits; none where no choice does."""
        return next((choice for choice in self._in_order(choices) if self.fits(choice)), None)

    def fits(self, choice: Choice) -> bool:
        """Whether a choice fits, and its error bound with it; replayed only where neither a bound nor another choice says it.

        Expandable segments help where bytes lie in pieces: where the choice without them is known to lack bytes, they do
        not fit either.
        """
        if choice not in self._lacks:
            plain = replace(choice, expandable_segments=False)
            if self._judge.bound(choice) > self._judge.usable_bytes(choice):
                self._bounded.add(choice)
                self._lacks[choice] = "bytes"
            elif self._lacks.get(plain) == "bytes":
                self._lacks[choice] = "bytes"
            else:
                self.replayed.add(choice)
                self._lacks[choice] = self._judge.lack(choice, sure=True)
        return self._lacks[choice] is None

    def failed(self, choice: Choice) -> bool:
        """Whether a choice is known not to fit."""
        return self._lacks.get(choice) is not None

    def leanest(self, choices: Sequence[Choice]) -> Choice:
        """The choice with the smallest bound; of equal ones the fastest."""
        return min(self._in_order(choices), key=self._judge.bound)

    def _in_order(self, choices: Iterable[Choice]) -> list[Choice]:
        """Fastest first; of equally fast ones those that change least and then the leanest.

        ZeRO takes DeepSpeed beside PyTorch, and comes before its like only where it is faster by more than `FOREIGN`.
        """

        def key(choice: Choice) -> tuple[int, int, bool, int]:
            seconds = self._seconds(choice) * (1 + FOREIGN * choice.sharding.startswith("zero"))
            alike = round(math.log(seconds) / ALIKE)
            return alike, self._changes(choice), choice.expandable_segments, self._judge.bound(choice)

        return sorted(choices, key=key)


def _kind(choice: Choice) -> tuple[object, ...]:
    """What decides by how much a choice is above its bound."""
    return choice.sharding, choice.checkpointing, choice.optimizer_offload
