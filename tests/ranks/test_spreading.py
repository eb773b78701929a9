"""How a step is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.admission import Admission, Cost, Split, TooLargeError
from oomph.live.ranks.spreading import joined, spread


class Sample(NamedTuple):
    tokens: int
    images: int


STEPS = st.lists(st.builds(Sample, st.integers(1, 40), st.integers(0, 2)), max_size=24)


def admission(limit: int = 200) -> Admission:
    return Admission(
        lambda shape: shape.samples * shape.tokens + 3 * shape.images,
        lambda shape: 1 + shape.samples * shape.tokens**1.5 + 20 * shape.images,
        limit,
    )


@given(STEPS, st.integers(1, 5))
def test_every_sample_is_on_one_rank(costs: list[Sample], ranks: int) -> None:
    splits = spread(admission().split, costs, ranks)
    assert len(splits) == ranks
    assert sorted(at for piece in joined(splits).micro_batches for at in piece) == list(range(len(costs)))
    for split in splits:
        for piece, shape in zip(split.micro_batches, split.shapes, strict=True):
            assert shape.samples == len(piece)
            assert shape.tokens == max(costs[at].tokens for at in piece)
            assert shape.images == sum(costs[at].images for at in piece)


@given(STEPS.filter(bool), st.integers(2, 5))
def test_no_rank_has_much_more_to_do_than_another(costs: list[Sample], ranks: int) -> None:
    """The most is at most the least and one sample more, by the times of single samples."""
    admitted = admission()
    alone = [admitted.split([cost]).seconds for cost in costs]
    loads = [sum(alone[at] for piece in split.micro_batches for at in piece) for split in spread(admitted.split, costs, ranks)]
    assert max(loads) - min(loads) <= max(alone) + 1e-6


def test_one_rank_has_what_the_admission_gives() -> None:
    costs = [Sample(tokens, 1) for tokens in (5, 30, 12, 12)]
    assert spread(admission().split, costs, 1) == (admission().split(costs),)
    assert joined(spread(admission().split, costs, 1)) == admission().split(costs)


def test_a_sample_that_does_not_fit_is_named_by_its_place_in_the_step() -> None:
    costs = [Sample(5, 0), Sample(9, 0), Sample(500, 0), Sample(7, 0)]
    with pytest.raises(TooLargeError) as error:
        spread(admission().split, costs, 2)
    assert (error.value.position, error.value.peak_bytes) == (2, 500)


def test_single_samples_of_one_size_are_asked_for_once() -> None:
    asked: list[int] = []

    def split(costs: Sequence[Cost]) -> Split:
        asked.append(len(costs))
        return admission().split(costs)

    spread(split, [Sample(5, 0)] * 64, 4)
    assert asked == [1, 16, 16, 16, 16]
