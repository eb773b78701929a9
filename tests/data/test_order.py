"""The order of samples: a pure function in which every sample comes as often as its weight says."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomph.live.data.order import Order, Part

PARTS = st.lists(
    st.builds(Part, st.integers(1, 40), st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.2])), min_size=1, max_size=4
).filter(lambda parts: Order(parts).epoch_samples > 0)


@given(parts=PARTS, seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_every_epoch_holds_each_sample_as_often_as_its_weight_says(parts: list[Part], seed: int, epoch: int) -> None:
    counts = Counter(Order(parts, seed).epoch(epoch).tolist())
    first = 0
    for part in parts:
        times = [counts[number] for number in range(first, first + part.samples)]
        assert set(times) <= {math.floor(part.weight), math.ceil(part.weight)}
        assert abs(sum(times) - part.weight * part.samples) <= 0.5
        first += part.samples
    assert sum(counts.values()) == Order(parts).epoch_samples == Order(parts).total_samples(1)


@given(parts=PARTS, seed=st.integers(0, 5))
def test_epochs_together_hold_each_sample_of_a_file_as_often_as_any_other(parts: list[Part], seed: int) -> None:
    order = Order(parts, seed)
    counts: Counter[int] = Counter()
    first = 0
    for epoch in range(12):
        counts.update(order.epoch(epoch).tolist())
    for part in parts:
        times = [counts[number] for number in range(first, first + part.samples)]
        assert max(times) - min(times) <= 1
        first += part.samples


@given(parts=PARTS, seed=st.integers(0, 5), batch=st.integers(1, 90), epochs=st.sampled_from([0.3, 1.0, 2.0, 2.5]))
def test_steps_are_the_epochs_cut_into_pieces(parts: list[Part], seed: int, batch: int, epochs: float) -> None:
    order = Order(parts, seed)
    row = np.concatenate([order.epoch(epoch) for epoch in range(math.ceil(epochs) + 1)]).tolist()
    total = order.total_samples(epochs)
    steps = [Order(parts, seed).step(step, batch, epochs) for step in reversed(range(order.steps(epochs, batch)))]
    assert [index for step in reversed(steps) for index in step] == row[:total]
    assert all(len(step) == batch for step in steps[1:])
    assert 1 <= len(steps[0]) <= batch
    assert order.step(order.steps(epochs, batch), batch, epochs) == []
    assert len(order.step(10_000, batch)) == batch


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order, other = Order([Part(1000, 1.0)], 0), Order([Part(1000, 1.0)], 1)
    rows = [order.epoch(0), order.epoch(1), other.epoch(0), other.epoch(1)]
    for number, row in enumerate(rows):
        assert sorted(row.tolist()) == list(range(1000))
        for before in [*rows[:number], np.arange(1000)]:
            assert (row == before).mean() < 0.02
            assert abs(np.corrcoef(row, before)[0, 1]) < 0.15


def test_the_order_is_this_one_for_ever() -> None:
    """Runs go on with another numpy and on another machine: these numbers must not change."""
    assert Order([Part(8, 1.0)], 7).epoch(3).tolist() == [2, 5, 0, 1, 6, 3, 4, 7]
    assert Order([Part(5, 0.4), Part(3, 2.0)], 1).step(1, 6) == [1, 5, 6, 5, 6, 0]


def test_without_shuffling_samples_come_as_they_stand() -> None:
    assert Order([Part(3, 1.0), Part(2, 2.0)], shuffle=False).epoch(5).tolist() == [0, 1, 2, 3, 4, 3, 4]


def test_a_step_far_ahead_costs_no_more_than_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    order = Order([Part(10, 1.0)], 0)
    make = order._make_epoch
    monkeypatch.setattr(order, "_epoch", lambda epoch: made.append(epoch) or make(epoch))
    order.step(10**9, 4)
    assert made == [4 * 10**8]
