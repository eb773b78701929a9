"""The admission of a planned stage: what its forms say of a micro-batch, made fit to be asked at every step."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from oomph.core.admission import Admission, Cost
from oomph.core.closed_form import LEAST_ROWS
from oomph.core.layout import Shape
from oomph.core.running import Planned
from oomph.core.stage import StageModel
from oomph.core.step_forms import StepForms
from oomph.records import Choice

_MOST_LOOPS = 4
"""Images of several samples together, for a model that loops over them: each number of them takes a trace."""
_NEVER = sys.maxsize


class Forms:
    """What micro-batches of a stage take with a choice. Where a shape would take a trace of its own, a larger one answers.

    Args:
        model: the stage.
        choice: the knobs.
        granularity: bytes that a storage is rounded up to.
    """

    def __init__(self, model: StageModel, choice: Choice, granularity: int) -> None:
        self._model, self._choice = model, choice
        self._forms, self._least_rows = StepForms(model, choice, granularity), least_rows(choice)
        self._closed = model.has_formulas(choice, Shape(choice.micro_batch, model.tokens, choice.micro_batch * model.images))

    def peak(self, shape: Shape) -> int:
        """Bytes at the peak of a micro-batch that adds to gradients, with all that is resident."""
        return _NEVER if self._loops_too_long(shape) else self._forms.peak(self._answering(shape))

    def peak_of_first(self, shape: Shape) -> int:
        """The same of the micro-batch that makes the gradients."""
        return _NEVER if self._loops_too_long(shape) else self._forms.peak_of_first(self._answering(shape))

    def evaluation_peak(self, shape: Shape) -> int:
        """The same of a forward without gradients, between two steps."""
        return _NEVER if self._loops_too_long(shape) else self._forms.evaluation_peak(self._answering(shape))

    def step_peak(self, shapes: Sequence[Shape]) -> int:
        """The same of a whole step, one micro-batch at least, its update included."""
        return self._forms.step_peak([self._answering(shape) for shape in shapes])

    def seconds(self, shape: Shape) -> float:
        """Estimated seconds of a micro-batch's forward and backward."""
        return self._forms.seconds(self._answering(shape))

    def prepare(self, costs: Iterable[Cost], effective_batch: int) -> None:
        """Makes the forms that steps of such samples may need, side by side."""
        if not self._closed or self._model.loops:
            return
        images = sorted({min(cost.images, 2) for cost in costs})
        tokens = LEAST_ROWS + 1
        shapes = [Shape(1, tokens, number) for number in images]
        if effective_batch > 1:
            sums = {min(a + b, 2) for a in images for b in images} | ({2} if images[-1:] > [0] else set())
            shapes += [Shape(2, tokens, number) for number in sorted(sums)]
        self._model.prepare_at(self._choice, shapes)

    def _loops_too_long(self, shape: Shape) -> bool:
        return self._model.loops and shape.samples > 1 and shape.images > _MOST_LOOPS

    def _answering(self, shape: Shape) -> Shape:
        """A shape that needs no less, and whose form is there or will be for others too."""
        shape = shape._replace(tokens=max(shape.tokens, -(-self._least_rows // shape.samples)))
        if not self._closed:
            samples = 1 << (shape.samples - 1).bit_length()
            return Shape(samples, self._model.tokens, samples * self._model.images)
        if shape.tokens % 8 == 0 and self._model.form(self._choice, shape._replace(tokens=shape.tokens + 1)).pads_masks:
            return shape._replace(tokens=shape.tokens + 1)
        return shape


def least_rows(choice: Choice) -> int:
    """The padded tokens that a micro-batch has at the least: enough for all chunks of a loss that is cut into chunks."""
    return LEAST_ROWS if choice.loss == "chunked" else 0


def admission(planned: Planned, choice: Choice, forms: Forms, grow_after: int) -> Admission:
    """What cuts the steps of a stage.

    A micro-batch that the recipe pins is never exceeded, and is not asked whether it is predicted to fit.

    Args:
        planned: the stage.
        choice: one of its configurations.
        forms: of this choice.
        grow_after: steps without running out of memory after which more is tried again.
    """
    most, limit = planned.pinned, planned.limit_bytes - planned.margin_bytes
    if most is not None:
        model = planned.model
        largest = Shape(most, model.tokens, most * model.images)
        limit = max(limit, forms.peak(largest), forms.peak_of_first(largest))

    def peak(shape: Shape) -> int:
        return _NEVER if most is not None and shape.samples > most else forms.peak(shape)

    def peak_of_first(shape: Shape) -> int:
        return _NEVER if most is not None and shape.samples > most else forms.peak_of_first(shape)

    return Admission(peak, forms.seconds, limit, grow_after, peak_of_first=peak_of_first, least_rows=least_rows(choice))


def admission_of_evaluation(planned: Planned, choice: Choice, forms: Forms) -> Admission:
    """What cuts evaluations of a stage."""
    limit = planned.limit_bytes - planned.margin_bytes
    return Admission(forms.evaluation_peak, forms.seconds, limit, least_rows=least_rows(choice))
