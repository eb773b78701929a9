"""The search by itself, over choices whose sizes and times are drawn at random."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from oomph.core.predict import Lack
from oomph.core.search import ALIKE, APART, STEP, Searcher
from oomph.records import Choice, Prediction, Speed

USABLE = 1000
CLOSE = (1 + ALIKE) / (1 - APART)
"""By what factor a time may be above another that a search takes for no better."""


class Facts(NamedTuple):
    """What is true of a choice: its bound is at most what it allocates, which is at most what it reserves."""

    bound: int
    allocated: int
    reserved: int
    seconds: float

    @property
    def lack(self) -> Lack | None:
        if self.reserved <= USABLE:
            return None
        return "bytes" if self.allocated > USABLE else "pieces"


@dataclass
class Table:
    """Answers a search from a table, and counts what it is asked."""

    facts: dict[Choice, Facts]
    replays: Counter[Choice] = field(default_factory=Counter)

    def bound(self, choice: Choice) -> int:
        return self.facts[choice].bound

    def usable_bytes(self, choice: Choice) -> int:
        return USABLE

    def lack(self, choice: Choice, sure: bool) -> Lack | None:
        assert sure
        self.replays[choice] += 1
        return self.facts[choice].lack

    def predict(self, choice: Choice) -> Prediction:
        facts = self.facts[choice]
        fits = facts.lack is None
        return Prediction(fits, facts.allocated, facts.reserved, 0, USABLE, (), {}, {}, None, (), 0.01, ())

    def speed(self, choice: Choice) -> Speed:
        return Speed(self.facts[choice].seconds, 1.0, 1.0, 0.5, None, {})

    def fitting(self) -> list[Choice]:
        return [choice for choice, facts in self.facts.items() if facts.lack is None]


def changes(choice: Choice) -> int:
    """As if the recipe had pinned a micro-batch of 1 and blocks."""
    return (choice.micro_batch != 1) + (choice.checkpointing != "blocks")


KINDS = [
    Choice(micro_batch, 1, micro_batch, checkpointing=checkpointing)
    for micro_batch, checkpointing in itertools.product(range(1, 5), ("none", "every-2", "blocks"))
]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Few seconds and sizes, so that equal ones meet; expandable segments take no time and reserve what is allocated.

    A kind of checkpointing is above its bound by the same, which is what a search learns of it.
    """
    facts = {}
    above = {kind: draw(st.integers(0, 10)) * 20 for kind in ("none", "every-2", "blocks")}
    for choice in draw(st.lists(st.sampled_from(KINDS), min_size=1, unique=True)):
        bound = draw(st.integers(1, 60)) * 20
        allocated = bound + above[choice.checkpointing]
        reserved = allocated + draw(st.integers(0, 10)) * 20
        seconds = draw(st.sampled_from([1.0, 2.0, 3.0])) * (1 + ALIKE / 3 * draw(st.integers(0, 2)))
        facts[choice] = Facts(bound, allocated, reserved, seconds)
        facts[replace(choice, expandable_segments=True)] = Facts(bound, allocated, allocated, seconds)
    return Table(facts)


@given(tables())
def test_the_frontier_leaves_out_only_what_it_beats(table: Table) -> None:
    found = Searcher(table, changes).frontier(table.facts)
    fitting = table.fitting()
    assert bool(found) == bool(fitting)
    assert set(found) <= set(fitting)
    for choice in fitting:
        seconds, allocated = table.facts[choice].seconds, table.facts[choice].allocated
        better = [table.facts[other] for other in found]
        assert any(b.seconds <= CLOSE * seconds and (1 - STEP) * b.allocated <= allocated for b in better)


@given(tables())
def test_a_frontier_gets_slower_and_leaner(table: Table) -> None:
    found = [table.facts[choice] for choice in Searcher(table, changes).frontier(table.facts)]
    for before, after in itertools.pairwise(found):
        assert after.allocated < (1 - STEP) * before.allocated
        assert before.seconds < (1 - APART) * after.seconds


@given(tables())
def test_the_fastest_that_fits_is_found(table: Table) -> None:
    found = Searcher(table, changes).fastest(table.facts)
    fitting = table.fitting()
    if not fitting:
        assert found is None
        return
    assert found in fitting
    fastest = min(table.facts[choice].seconds for choice in fitting)
    assert table.facts[found].seconds <= (1 + ALIKE) * fastest
    assert table.facts[Searcher(table, changes).frontier(table.facts)[0]].seconds <= CLOSE * fastest


@given(tables())
def test_the_allocator_is_left_alone_where_that_helps_nothing(table: Table) -> None:
    searcher = Searcher(table, changes)
    for choice in [*searcher.frontier(table.facts), *filter(None, [searcher.fastest(table.facts)])]:
        if choice.expandable_segments:
            assert table.facts[replace(choice, expandable_segments=False)].lack == "pieces"


@given(tables())
def test_nothing_is_replayed_twice_or_though_a_bound_says_it(table: Table) -> None:
    searcher = Searcher(table, changes)
    first = searcher.frontier(table.facts)
    assert searcher.frontier(table.facts) == first
    searcher.fastest(table.facts)
    assert set(table.replays.values()) <= {1}
    assert searcher.replayed == set(table.replays)
    assert all(table.facts[choice].bound <= USABLE for choice in table.replays)
    assert not searcher.bounded & searcher.replayed
    known = {choice for choice in table.facts if searcher.failed(choice)}
    assert not known & set(table.fitting())


def one_each(facts: Sequence[Facts]) -> Table:
    """A table of as many choices, the first of which changes nothing."""
    order = sorted(KINDS, key=changes)
    return Table(dict(zip(order, facts, strict=False)))


def test_of_equally_fast_choices_the_smaller_change_comes_first() -> None:
    table = one_each([Facts(500, 500, 500, 1.0 + ALIKE / 10), Facts(500, 500, 500, 1.0)])
    least, other = table.facts
    assert (changes(least), changes(other)) == (0, 1)
    assert Searcher(table, changes).frontier([other, least]) == [least]
    table.facts[least] = table.facts[least]._replace(seconds=1.0 + 2 * ALIKE)
    assert Searcher(table, changes).frontier([other, least]) == [other]


def test_a_choice_that_only_lacks_pieces_gets_expandable_segments() -> None:
    plain = KINDS[0]
    grown = replace(plain, expandable_segments=True)
    table = Table({plain: Facts(900, 900, 1100, 1.0), grown: Facts(900, 900, 900, 1.0)})
    searcher = Searcher(table, changes)
    assert searcher.fastest(table.facts) == grown
    assert searcher.failed(plain)
    table.facts[plain] = Facts(900, 1050, 1100, 1.0)
    table.replays.clear()
    assert Searcher(table, changes).fastest(table.facts) is None
    assert table.replays == {plain: 1}


def test_pinned_expandable_segments_need_no_replay_without_them() -> None:
    grown = replace(KINDS[0], expandable_segments=True)
    table = Table({grown: Facts(900, 900, 900, 1.0)})
    assert Searcher(table, changes).frontier([grown]) == [grown]


def test_two_choices_that_hardly_differ_in_time_are_one_rung() -> None:
    """The leaner one, unless the faster one is faster by more than nobody would notice."""
    table = one_each([Facts(600, 600, 600, 1.0), Facts(400, 400, 400, 1.0 + APART / 2)])
    fast, lean = table.facts
    assert Searcher(table, changes).frontier(table.facts) == [lean]
    table.facts[lean] = table.facts[lean]._replace(seconds=1.0 + 2 * APART)
    assert Searcher(table, changes).frontier(table.facts) == [fast, lean]


def test_what_a_kind_has_above_its_bound_is_learned() -> None:
    """A choice whose bound lies below the frontier, but not what it will need, is no rung and is not replayed."""
    table = one_each([Facts(500, 700, 700, 1.0), Facts(480, 680, 680, 2.0)])
    fast, slow = (choice for choice in table.facts)
    table = Table({fast: table.facts[fast], replace(fast, micro_batch=7): table.facts[slow]})
    assert Searcher(table, changes).frontier(table.facts) == [fast]
    assert set(table.replays) == {fast}


def test_a_bound_above_the_frontier_is_enough() -> None:
    """What is slower than a choice that fits, and has at least as much, is not replayed; nor is what cannot fit."""
    facts = [Facts(500, 500, 500, 1.0), Facts(490, 490, 490, 2.0), Facts(1001, 1001, 1001, 0.5), Facts(400, 600, 600, 3.0)]
    table = one_each(facts)
    searcher = Searcher(table, changes)
    best, beaten, huge, replayed = table.facts
    assert searcher.frontier(table.facts) == [best]
    assert set(table.replays) == {best, replayed}
    assert (searcher.bounded, searcher.replayed) == ({huge, beaten}, {best, replayed})
    assert searcher.failed(huge)
    assert not searcher.failed(beaten)


def test_the_leanest_has_the_least_bound_and_of_those_is_the_fastest() -> None:
    table = one_each([Facts(500, 500, 500, 1.0), Facts(300, 400, 400, 3.0), Facts(300, 900, 900, 2.0)])
    assert Searcher(table, changes).leanest(list(table.facts)) == list(table.facts)[2]
