"""From a closed form to the events of one rank: a warm-up step, a step as all later ones are, and an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from oomph.core.closed_form import ClosedForm
from oomph.core.events import Events, Segment
from oomph.core.masters import add_masters
from oomph.core.offload import offload_optimizer
from oomph.core.sharding import shard
from oomph.records import Choice


class Shape(NamedTuple):
    """What a micro-batch's memory depends on: samples, tokens of the longest sample, images in all samples together."""

    samples: int
    tokens: int
    images: int


def lay_out(
    form: ClosedForm, choice: Choice, tokens: int, images_per_sample: int, evaluation: ClosedForm | None = None
) -> Events:
    """The events of one rank of the choice, every sample of `tokens` tokens and `images_per_sample` images.

    Args:
        form: of the micro-batch's family.
        choice: the knobs.
        tokens: of a sample.
        images_per_sample: of a sample.
        evaluation: of the evaluated batch's family, where that is another.

    Raises:
        UserError: the sharding cannot hold these parameters, or a tensor is impossibly large.
    """
    shape = Shape(choice.micro_batch, tokens, choice.micro_batch * images_per_sample)
    evaluated = evaluation_shape(choice, tokens, images_per_sample)
    events = shard(compose(form, shape, choice.accumulation, evaluated, evaluation), form.parameters, choice)
    events = add_masters(events, form.parameters, choice)
    return offload_optimizer(events) if choice.optimizer_offload else events


def evaluation_shape(choice: Choice, tokens: int, images_per_sample: int) -> Shape | None:
    """The shape of an evaluated batch; none where the run does not evaluate."""
    if choice.eval_batch is None:
        return None
    return Shape(choice.eval_batch, tokens, choice.eval_batch * images_per_sample)


class _Timelines(NamedTuple):
    """The pieces of a form's timeline, with what has to change where a piece runs again."""

    pieces: dict[str, tuple[list[int], tuple[tuple[int, str], ...]]]
    persistent: frozenset[int]
    left: tuple[int, ...]


def timelines(form: ClosedForm) -> _Timelines:
    """Cuts the timeline into its pieces.

    `persistent` are the storages that a micro-batch allocates once for the whole run, library workspaces for instance, and, as
    entries that free them, those from the load that it replaces; `left` are those that the first micro-batch leaves to the end
    of its step, besides gradients.
    """
    pieces = _pieces(form)
    freed = _freed(pieces["first"][0]) | _freed(pieces["next"][0]) | _freed(pieces["warmup/optimizer"][0])
    born = [s for s in pieces["first"][0] if s >= 0]
    late = _freed(pieces["warmup/optimizer"][0]) - _freed(pieces["step/optimizer"][0])
    dropped = {~s for s in pieces["load"][0] if s >= 0} & set(pieces["first"][0])
    once = frozenset(s for s in born if s not in freed) | dropped
    return _Timelines(pieces, once, tuple(s for s in born if s in late))


def _pieces(form: ClosedForm) -> dict[str, tuple[list[int], tuple[tuple[int, str], ...]]]:
    """The timeline of each piece, and its marks by their position in it."""
    pieces = {}
    for piece in form.pieces:
        marks = tuple((at - piece.start, phase) for at, phase in form.marks if piece.start <= at < piece.stop)
        pieces[piece.name] = form.timeline[piece.start : piece.stop], marks
    return pieces


def _freed(timeline: Iterable[int]) -> set[int]:
    return {~entry for entry in timeline if entry < 0}


def compose(
    form: ClosedForm, shape: Shape, accumulation: int, evaluated: Shape | None, evaluation: ClosedForm | None = None
) -> Events:
    """The events of one GPU without sharding.

    Args:
        form: of the shape's family.
        shape: of a micro-batch.
        accumulation: micro-batches of a step.
        evaluated: the shape of an evaluated batch; none to leave the evaluation out.
        evaluation: of the evaluated shape's family, where that is another.
    """
    cut = timelines(form)
    first, first_marks = cut.pieces["first"]
    optimizer, optimizer_marks = cut.pieces["step/optimizer"]
    segments = [Segment("load", *cut.pieces["load"])]
    for step in ("warmup", "step"):
        again = step == "step"
        gone = cut.persistent if again else frozenset()
        segments.append(Segment(f"{step}/first", *_without(first, first_marks, gone)))
        if accumulation > 1:
            segments.append(Segment(f"{step}/next", *cut.pieces["next"], accumulation - 1))
        ending = ([*optimizer, *(~s for s in cut.left)], optimizer_marks) if again else cut.pieces["warmup/optimizer"]
        segments.append(Segment(f"{step}/optimizer", *ending))
    events = _columns(form, shape)
    events.segments = segments
    if evaluated is not None:
        _append_evaluation(events, evaluation or form, evaluated)
    return events


def as_traced(form: ClosedForm, shape: Sequence[int]) -> Events:
    """The events of a form whose pieces follow each other as they were traced.

    Args:
        form: for example of whole steps.
        shape: (samples, tokens, images) of a micro-batch.
    """
    events = _columns(form, Shape(*shape))
    events.segments = [Segment(name, *piece) for name, piece in _pieces(form).items()]
    return events


def _append_evaluation(events: Events, form: ClosedForm, shape: Shape) -> None:
    """Adds the storages of an evaluation, which lives by itself, and its segment."""
    timeline, marks = timelines(form).pieces["evaluate"]
    own = _columns(form, shape)
    numbers = {
        storage: events.add(own.sizes[storage], own.shapes[storage], own.kinds[storage], own.layers[storage])
        for storage in timeline
        if storage >= 0
    }
    renumbered = [numbers[entry] if entry >= 0 else ~numbers[~entry] for entry in timeline]
    events.segments.append(Segment("evaluate", renumbered, marks))


def _without(
    timeline: Sequence[int], marks: tuple[tuple[int, str], ...], gone: frozenset[int]
) -> tuple[list[int], tuple[tuple[int, str], ...]]:
    kept = [entry for entry in timeline if entry not in gone]
    dropped = [position for position, entry in enumerate(timeline) if entry in gone]
    return kept, tuple((at - sum(position < at for position in dropped), phase) for at, phase in marks)


def _columns(form: ClosedForm, shape: Shape) -> Events:
    """The form's storages at a shape, without segments."""
    sizes = form.sizes(shape)
    shapes = _shapes(form, form.dimensions(shape).tolist(), sizes.tolist())
    return Events(
        sizes=sizes[np.array(form.formula)].tolist(),
        shapes=[shapes[number] for number in form.formula],
        kinds=[form.kinds[number] for number in form.kind],
        layers=list(form.layer),
        parameters=list(form.parameter),
    )


def _shapes(form: ClosedForm, dimensions: list[list[int]], sizes: list[int]) -> list[tuple[int, ...]]:
    """The shape of each formula's storage; one of as many bytes where a function gives its size."""
    return [
        (nbytes,) if formula.size else tuple(row[: len(formula.dimensions)])
        for row, formula, nbytes in zip(dimensions, form.formulas, sizes, strict=True)
    ]
