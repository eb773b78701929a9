"""Splits of a step: every sample once, nothing that is predicted not to fit, and no faster one in sight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.core.admission import Admission, Split, TooLargeError
from oomph.core.layout import Shape

RESIDENT, TOKEN, IMAGE, LAUNCHES = 10_000, 7, 900, 250.0


class Sample(NamedTuple):
    tokens: int
    images: int = 0


def peak(shape: Shape) -> int:
    return RESIDENT + TOKEN * shape.samples * shape.tokens + IMAGE * shape.images


def seconds(shape: Shape) -> float:
    """Launches that take as long whatever the size, work on every padded token, and attention."""
    return LAUNCHES + shape.samples * shape.tokens * (1 + shape.tokens / 100) + 300.0 * shape.images


def admission(limit_bytes: int = 60_000, grow_after: int = 3) -> Admission:
    return Admission(peak, seconds, limit_bytes, grow_after)


def shape_of(samples: Sequence[Sample], group: Sequence[int]) -> Shape:
    chosen = [samples[at] for at in group]
    return Shape(len(chosen), max(sample.tokens for sample in chosen), sum(sample.images for sample in chosen))


def cuts(row: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    """Every way to cut a row into pieces."""
    for marks in itertools.product((False, True), repeat=max(len(row) - 1, 0)):
        places = [0, *(at for at, mark in enumerate(marks, 1) if mark), len(row)]
        yield [row[start:end] for start, end in itertools.pairwise(places)]


steps = st.lists(st.builds(Sample, st.integers(1, 3000), st.integers(0, 2)), min_size=1, max_size=40)


@given(steps, st.integers(RESIDENT + 3000 * TOKEN + 2 * IMAGE, 200_000))
def test_every_sample_is_in_one_micro_batch_that_fits(samples: list[Sample], limit: int) -> None:
    found = admission(limit).split(samples)
    assert sorted(at for group in found.micro_batches for at in group) == list(range(len(samples)))
    assert found.shapes == tuple(shape_of(samples, group) for group in found.micro_batches)
    assert found.peak_bytes == tuple(map(peak, found.shapes))
    assert max(found.peak_bytes) <= limit
    assert found.seconds == pytest.approx(sum(map(seconds, found.shapes)))
    assert found == admission(limit).split(samples)


@given(st.lists(st.builds(Sample, st.integers(1, 3000), st.integers(0, 1)), min_size=1, max_size=7))
def test_no_cut_of_the_sorted_row_is_faster(samples: list[Sample]) -> None:
    row = sorted(range(len(samples)), key=lambda at: (-samples[at].tokens, -samples[at].images, at))
    fitting = [
        sum(seconds(shape_of(samples, group)) for group in cut)
        for cut in cuts(row)
        if all(peak(shape_of(samples, group)) <= 60_000 for group in cut)
    ]
    assert admission().split(samples).seconds == pytest.approx(min(fitting))


def test_long_samples_get_small_micro_batches_and_short_ones_large_ones() -> None:
    found = admission().split([Sample(3000)] * 4 + [Sample(100)] * 60)
    sizes = {shape.tokens: shape.samples for shape in found.shapes}
    assert sizes[3000] == 2
    assert sizes[100] >= 30


def test_a_sample_that_does_not_fit_by_itself_is_named() -> None:
    with pytest.raises(TooLargeError) as raised:
        admission().split([Sample(10), Sample(9000), Sample(20)])
    assert (raised.value.position, raised.value.peak_bytes) == (1, peak(Shape(1, 9000, 0)))
    assert raised.value.limit_bytes == 60_000


def test_an_empty_step_has_no_micro_batches() -> None:
    assert admission().split([]) == Split((), (), (), 0.0)


def test_a_failure_halves_what_the_micro_batch_takes_and_is_never_reached_again() -> None:
    learning, samples = admission(), [Sample(1000)] * 7
    first = learning.split(samples)
    assert first.shapes[0].samples == 7
    learning.failed(first, 0)
    second = learning.split(samples)
    assert max(shape.samples for shape in second.shapes) == 4
    for _ in range(100):
        learning.committed()
        assert max(learning.split(samples).peak_bytes) < first.peak_bytes[0]
    assert max(shape.samples for shape in learning.split(samples).shapes) == 6


def test_it_grows_only_after_enough_clean_steps_in_a_row() -> None:
    learning, samples = admission(grow_after=3), [Sample(1000)] * 7
    learning.failed(learning.split(samples), 0)
    small = learning.limit_bytes
    for _ in range(2):
        learning.committed()
    assert learning.limit_bytes == small
    learning.shrink()
    less = learning.limit_bytes
    assert less < small
    for _ in range(2):
        learning.committed()
    assert learning.limit_bytes == less
    learning.committed()
    assert learning.limit_bytes > less


def test_a_single_sample_that_failed_is_not_tried_again() -> None:
    learning, samples = admission(), [Sample(2000)]
    learning.failed(learning.split(samples), 0)
    with pytest.raises(TooLargeError):
        learning.split(samples)


@given(st.lists(st.sampled_from(["fail", "clean", "shrink"]), max_size=30))
def test_what_was_learnt_survives_a_checkpoint(events: list[str]) -> None:
    learning, samples = admission(), [Sample(400), Sample(900), Sample(300)]
    for event in events:
        try:
            found = learning.split(samples)
        except TooLargeError:
            break
        {"fail": lambda f=found: learning.failed(f, 0), "clean": learning.committed, "shrink": learning.shrink}[event]()
    again = admission()
    again.restore(learning.state())
    assert again.state() == learning.state()
    smaller = admission(limit_bytes=20_000)
    smaller.restore(learning.state())
    assert smaller.limit_bytes <= 20_000


def test_the_first_micro_batch_has_no_gradients_beside_it() -> None:
    gradients = 15_000
    learning = Admission(lambda shape: peak(shape) + gradients, seconds, 60_000, peak_of_first=peak)
    found = learning.split([Sample(1000)] * 10)
    assert [shape.samples for shape in found.shapes][:2] == [7, 3]
    assert found.peak_bytes == (peak(found.shapes[0]), peak(found.shapes[1]) + gradients)


def test_micro_batches_are_padded_to_the_least_number_of_rows() -> None:
    found = Admission(peak, seconds, 60_000, least_rows=256).split([Sample(10)] * 3)
    assert found.shapes == (Shape(3, 86, 0),)
