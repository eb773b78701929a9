"""Peaks within a step are those of the events that planning lays out, whatever the shapes of the micro-batches are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from oomph.core.closed_form import ClosedForm
from oomph.core.devices import find_gpu
from oomph.core.footprint import live_footprint
from oomph.core.layout import Shape, compose
from oomph.core.masters import add_masters
from oomph.core.speed import cost
from oomph.core.step_forms import StepForms
from oomph.records import Choice

SHAPES = [Shape(4, 700, 4), Shape(1, 2623, 1), Shape(9, 300, 2)]
CHOICE = Choice(micro_batch=8, accumulation=2, effective_batch=16, eval_batch=8)


class OneForm:
    """A stage whose form is the same for all shapes."""

    gpu = find_gpu("A100-SXM4-40GB")
    images = 1

    def __init__(self, form: ClosedForm) -> None:
        self._form = form

    def form(self, choice: Choice, shape: Shape) -> ClosedForm:
        assert (choice.gpus, choice.sharding, choice.eval_batch) == (1, "none", None)
        return self._form


def forms(form: ClosedForm, granularity: int = 1, **knobs: Any) -> StepForms:
    return StepForms(OneForm(form), Choice(**{**vars(CHOICE), **knobs}), granularity)  # type: ignore[arg-type]


def replayed(form: ClosedForm, shapes: Sequence[Shape]) -> list[int]:
    """The peaks of a step's parts, counted event by event, after a warm-up step."""
    events = [compose(form, shape, 2, None) for shape in shapes]
    warm = [segment for segment in events[0].segments if not segment.name.startswith("step")]
    alive = sum(
        events[0].sizes[entry] if entry >= 0 else -events[0].sizes[~entry] for part in warm for entry in part.timeline
    )
    peaks = []
    for number, (laid, shape) in enumerate(zip([*events, events[0]], [*shapes, None], strict=True)):
        name = "step/optimizer" if shape is None else "step/first" if number == 0 else "step/next"
        peak = alive
        for entry in next(segment for segment in laid.segments if segment.name == name).timeline:
            alive += laid.sizes[entry] if entry >= 0 else -laid.sizes[~entry]
            peak = max(peak, alive)
        peaks.append(peak)
    return peaks


def test_each_part_of_a_step_peaks_where_its_events_do(toy: ClosedForm) -> None:
    first, *others, update = replayed(toy, SHAPES)
    found = forms(toy)
    assert found.peak_of_first(SHAPES[0]) == first
    assert [found.peak(shape) for shape in SHAPES[1:]] == others
    assert found.step_peak(SHAPES) == max(first, *others, update)
    assert found.step_peak(SHAPES[:1]) == max(first, update)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_micro_batches_peak_as_planned(toy: ClosedForm, shape: Shape) -> None:
    laid = live_footprint(compose(toy, shape, 2, None))
    assert forms(toy).step_peak([shape, shape]) == laid.allocated_peak_bytes


def test_master_weights_are_resident(toy: ClosedForm) -> None:
    choice = Choice(**{**vars(CHOICE), "master_weights": True})
    shape = SHAPES[0]
    events = add_masters(compose(toy, shape, 2, None), toy.parameters, choice)
    assert forms(toy, master_weights=True).step_peak([shape, shape]) == live_footprint(events).allocated_peak_bytes
    assert forms(toy, master_weights=True).peak(shape) > forms(toy).peak(shape)


def test_storages_are_rounded_up(toy: ClosedForm) -> None:
    exact, rounded = (forms(toy, granularity).peak(Shape(3, 333, 3)) for granularity in (1, 512))
    assert rounded > exact
    assert rounded % 512 == 0


def test_seconds_are_those_of_a_micro_batch_that_adds_to_gradients(toy: ClosedForm) -> None:
    for shape in SHAPES:
        assert forms(toy).seconds(shape) == pytest.approx(sum(cost(toy, shape, OneForm.gpu).next))
