"""What a micro-batch of any shape takes within a step of a run, and how long: fast enough to be asked at every step."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from oomph.core.closed_form import LEAST_ROWS, ClosedForm
from oomph.core.eight_bit import EIGHT_BIT, state_bytes
from oomph.core.events import Events
from oomph.core.layout import Shape, compose, timelines
from oomph.core.masters import add_masters, has_masters
from oomph.core.offload import offload_optimizer
from oomph.core.ranks import STEP_COUNTER
from oomph.core.speed import Facts
from oomph.core.stage import StageModel
from oomph.records import Choice

Numbers = npt.NDArray[np.int64]


class StepForms:
    """The closed forms of one choice of a stage on one device, as functions of a micro-batch's shape.

    The states of the optimizer are there, those of parameters too that get no gradient. Nothing is sharded. What only images
    reach, such as the projector, has a gradient from the first micro-batch with images on.

    Args:
        model: the stage.
        choice: the knobs; its batch sizes have no part in it.
        granularity: bytes that a storage is rounded up to: 512 with CUDA's allocator, 1 where nothing is rounded.
    """

    def __init__(self, model: StageModel, choice: Choice, granularity: int) -> None:
        self._model, self._granularity = model, granularity
        self._choice = replace(choice, gpus=1, nodes=1, sharding="none", eval_batch=None)
        self._known: dict[int, tuple[_Timelines, Facts]] = {}

    def peak(self, shape: Shape, after_images: bool = True) -> int:
        """Bytes at the peak of a micro-batch that adds to gradients, with all that is resident.

        Args:
            shape: of the micro-batch.
            after_images: whether one before it had images; if not, it takes no more than if one had.
        """
        timelines, _ = self._of(shape)
        if shape.images and not after_images:
            return timelines.peak("next", shape, self._granularity, self._seeing)
        gradients = 0
        if not shape.images and after_images and timelines.unreached:
            gradients = sum(_rounded([timelines.parameters[n].nbytes for n in self._seeing], self._granularity))
        return timelines.peak("next", shape, self._granularity) + gradients

    def peak_of_first(self, shape: Shape) -> int:
        """Bytes at the peak of the micro-batch that makes the gradients, with all that is resident."""
        timelines, _ = self._of(shape)
        return timelines.peak("first", shape, self._granularity)

    def evaluation_peak(self, shape: Shape) -> int:
        """Bytes at the peak of a forward without gradients, between two steps."""
        return self._of(shape)[0].peak("evaluate", shape, self._granularity)

    def step_peak(self, shapes: Sequence[Shape]) -> int:
        """Bytes at the peak of a whole step of these micro-batches, one at least, the optimizer's part included."""
        peaks = [self.peak_of_first(shapes[0])]
        peaks += [self.peak(shape, any(before.images for before in shapes[:at])) for at, shape in enumerate(shapes) if at]
        updated = next((shape for shape in shapes if shape.images), shapes[0])
        return max(*peaks, self._of(updated)[0].peak("optimizer", updated, self._granularity))

    def seconds(self, shape: Shape) -> float:
        """Estimated seconds of a micro-batch's forward and backward, by the roofline of the stage's card."""
        _, facts = self._of(shape)
        return sum(facts.cost(shape, self._model.gpu, 1.0).next)

    @functools.cached_property
    def _seeing(self) -> frozenset[int]:
        """The parameters that get a gradient from images alone; none where no sample has an image."""
        if not self._model.images:
            return frozenset()
        text, seen = (self._model.form(self._choice, Shape(1, LEAST_ROWS + 1, images)).reached for images in (0, 1))
        return seen - text

    def _of(self, shape: Shape) -> tuple[_Timelines, Facts]:
        form = self._model.form(self._choice, shape)
        if id(form) not in self._known:
            events = _events(form, self._choice, shape)
            self._known[id(form)] = _Timelines(form, events, self._choice), Facts(form)
        return self._known[id(form)]


def _events(form: ClosedForm, choice: Choice, shape: Shape) -> Events:
    events = add_masters(compose(form, shape, 2, None), form.parameters, choice)
    return offload_optimizer(events) if choice.optimizer_offload else events


def _rounded(sizes: Iterable[int], granularity: int) -> list[int]:
    return [-(-nbytes // granularity) * granularity for nbytes in sizes]


class _Timelines:
    """The parts of a step as columns: the births and deaths of each, and what is alive before it begins.

    A storage that the form does not have, a master weight for instance, has the same size at every shape.
    """

    def __init__(self, form: ClosedForm, events: Events, choice: Choice) -> None:
        self._form, self._choice = form, choice
        self.parameters = form.parameters
        self.unreached = [p for n, p in enumerate(form.parameters) if p.trainable and n not in form.reached]
        shapes = zip(events.kinds, events.shapes, strict=True)
        self._counts = any(kind.role == "optimizer" and shape == () for kind, shape in shapes)
        gradients = {number for number, kind in enumerate(form.kinds) if kind.role == "gradient"}
        self._gradients = {s: form.parameter[s] for s, kind in enumerate(form.kind) if kind in gradients}
        self._formula = np.array(form.formula, dtype=np.int64)
        self._constant = np.array(events.sizes[len(form.formula) :], dtype=np.int64)
        named = {segment.name: np.array(segment.timeline, dtype=np.int64) for segment in events.segments}
        before = np.concatenate([named[name] for name in ("load", "warmup/first", "warmup/next", "warmup/optimizer")])
        self._before: dict[str, Numbers] = {}
        self._parts: dict[str, Numbers] = {}
        for part in ("first", "next", "optimizer"):
            self._before[part], self._parts[part] = _alive(before), named[f"step/{part}"]
            before = np.concatenate([before, self._parts[part]])
        self._before["evaluate"] = _alive(before)
        self._parts["evaluate"] = np.array(timelines(form).pieces["evaluate"][0], dtype=np.int64)

    def peak(self, part: str, shape: Shape, granularity: int, new: Collection[int] = ()) -> int:
        """Most bytes alive in a part of the step; the gradients of the parameters `new` are made in it and stay."""
        of_formulas = self._form.sizes(shape)[self._formula]
        sizes = -(-np.concatenate([of_formulas, self._constant]) // granularity) * granularity
        before, timeline = self._before[part], self._parts[part]
        if new:
            made = np.array([s for s, parameter in self._gradients.items() if parameter in new], dtype=np.int64)
            before, timeline = before[~np.isin(before, made)], timeline[~np.isin(timeline, ~made)]
        changes = np.where(timeline >= 0, sizes[timeline], -sizes[~timeline])
        resident = int(sizes[before].sum()) + self._states_unreached(granularity)
        return resident + max(0, int(changes.cumsum().max(initial=0)))

    def _states_unreached(self, granularity: int) -> int:
        """Bytes of the states of parameters without a gradient, which the trace has only where there are master weights."""
        if not self.unreached or self._choice.optimizer_offload or has_masters(self._choice):
            return 0
        if self._choice.optimizer in EIGHT_BIT:
            return state_bytes(self.unreached, self._choice.optimizer)
        sizes = [nbytes for p in self.unreached for nbytes in (p.nbytes, p.nbytes, STEP_COUNTER * self._counts)]
        return sum(_rounded(sizes, granularity))


def _alive(timeline: Numbers) -> Numbers:
    """The storages that a timeline leaves alive."""
    last: dict[int, bool] = {}
    for entry in timeline.tolist():
        last[entry if entry >= 0 else ~entry] = entry >= 0
    return np.array([storage for storage, alive in last.items() if alive], dtype=np.int64)
